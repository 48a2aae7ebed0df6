"""One member machine on the network: host, links, discovery and the member list.

`open_node` starts everything in one nursery and stops it in order. The roles of the
process (a shard, a driver, or both) register with the node and are given the frames
that are theirs. Runs on the trio thread.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pals.config import Profile, SwarmEntry, SwarmSecret
from pals.errors import InvalidFrame, InvalidRecord, NotAMember, PalsError, SwarmSecretInvalid
from pals.net.administration import load_operator
from pals.net.backend import Backend
from pals.net.backend_peer import PeerBackend
from pals.net.backends import open_node_backend
from pals.net.bootstrap import Bootstrap, Meeting
from pals.net.control import Control, Ping, Pong, decode_control
from pals.net.discovery import Discovery, Sources
from pals.net.handshake import LinkSecrets
from pals.net.host import Host, open_host, ungrouped_errors
from pals.net.hosting import run_hosting
from pals.net.keeper import Keeper, Surroundings, cut_when_expired
from pals.net.links import Arrival, Links
from pals.net.membership import first_roster
from pals.net.nat.traversal import Traversal, TraversalOptions, open_traversal
from pals.net.pings import Pings
from pals.net.process_report import RoleLine
from pals.net.report_socket import serve_reports
from pals.net.revival import ask_members
from pals.net.wire import CONTROL_SHAPE, Codec, FrameShape, Kind, Lane
from pals.settings import NodeSettings
from pals.swarm.allowlist import AllowList
from pals.swarm.hints import Contacts
from pals.swarm.identity import Identity
from pals.swarm.keys import epoch_prk
from pals.swarm.ledger import Held, Ledger, check_secret
from pals.types import PeerId, SwarmId, short_id

if TYPE_CHECKING:
    from pals.backend.service import BackendService

_log = logging.getLogger(__name__)

LEAVE_RELAY_S = 1.0
FIRST_SECRET_S = 10.0
"""How long a machine that missed a rotation waits at its start for the newer secret."""


class Role(Protocol):
    """What a process does on the network; see `ShardService` and `SessionClient`."""

    def accepted(self, lane: Lane) -> tuple[FrameShape, ...]:
        """Return the shapes of this role's rows; no two roles of a node share one."""
        ...

    def on_control(self, peer: PeerId, message: Control) -> None: ...

    def on_rows(self, peer: PeerId, arrival: Arrival) -> None: ...

    def needs(self, peer: PeerId) -> bool: ...

    def on_peer_lost(self, peer: PeerId, problem: str) -> None: ...

    def describe(self) -> RoleLine:
        """Return what people are told of it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeOptions:
    """What a node is made of.

    Attributes:
        profile: Where the last verified roster is kept.
        entry: The swarm, from the profile.
        secret: The swarm secret of the current epoch.
        identity: This machine's identity.
        settings: Addresses, peers and intervals.
        endpoint: Where the same process answers HTTP; empty for nowhere.
        make_ephemeral: Source of the links' X25519 keys.
    """

    profile: Profile
    entry: SwarmEntry
    secret: SwarmSecret
    identity: Identity
    settings: NodeSettings
    endpoint: str = ""
    make_ephemeral: Callable[[], X25519PrivateKey] = X25519PrivateKey.generate

    @property
    def swarm_id(self) -> SwarmId:
        return SwarmId(bytes.fromhex(self.entry.swarm_id))

    def traversal(self) -> TraversalOptions:
        """Return how this machine may be reached; raise `InvalidConfig` as it is used."""
        return TraversalOptions(
            announced=self.settings.announce,
            upnp=self.settings.upnp,
            allow_relay=self.settings.allow_relay,
            use_relay=self.settings.use_relay,
        )

    def link_secrets(self) -> LinkSecrets:
        return LinkSecrets(
            swarm_id=self.swarm_id,
            epoch=self.entry.epoch,
            epoch_prk=epoch_prk(self.swarm_id, self.entry.epoch, self.secret.reveal()),
            local=self.identity.peer_id,
            prefill_codec=Codec[self.settings.prefill_codec.upper()],
        )


@dataclass(slots=True)
class _Dispatch:
    """Gives each frame to the role whose it is."""

    roles: list[Role] = field(default_factory=list[Role])
    pings: Pings = field(default_factory=Pings)

    def accepted(self, peer: PeerId, lane: Lane) -> tuple[FrameShape, ...]:
        if lane is Lane.CONTROL:
            return (CONTROL_SHAPE,)
        return tuple(shape for role in self.roles for shape in role.accepted(lane))

    def on_frame(self, peer: PeerId, arrival: Arrival) -> None:
        frame = arrival.frame
        if frame.shape.kind is Kind.CONTROL:
            self._on_control(peer, decode_control(peer, frame.payload))
            return
        for role in self.roles:
            if frame.shape in role.accepted(frame.lane):
                role.on_rows(peer, arrival)
                return
        raise InvalidFrame(peer=peer, problem=f"rows of kind {frame.shape.kind.name.lower()}")

    def _on_control(self, peer: PeerId, message: Control) -> None:
        if isinstance(message, Ping | Pong):
            self.pings.take(peer, message)
            return
        for role in self.roles:
            role.on_control(peer, message)

    def needs(self, peer: PeerId) -> bool:
        return any(role.needs(peer) for role in self.roles)

    def on_link_lost(self, peer: PeerId, problem: str) -> None:
        for role in self.roles:
            role.on_peer_lost(peer, problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A running member; made by `open_node`; ``started_at`` is on trio's clock."""

    options: NodeOptions
    host: Host
    links: Links
    discovery: Discovery
    traversal: Traversal
    contacts: Contacts
    allow_list: AllowList
    keeper: Keeper
    nursery: trio.Nursery
    started_at: float
    _bootstrap: Bootstrap
    _dispatch: _Dispatch

    @property
    def peer_id(self) -> PeerId:
        return self.host.peer_id

    def add_role(self, role: Role) -> None:
        self._dispatch.roles.append(role)

    def roles(self) -> list[RoleLine]:
        """Return what this process does for the swarm now."""
        return [role.describe() for role in self._dispatch.roles]

    async def ping(self, peer: PeerId, *, deadline_s: float) -> float:
        """Return the seconds that a small sealed message takes to a linked peer and back.

        Raises:
            PeerUnreachable: There is no link with it, or no answer in time.
        """
        return await self._dispatch.pings.round_trip_s(peer, deadline_s=deadline_s)

    def needs(self, peer: PeerId) -> bool:
        """Return whether anything would be lost now with the links to ``peer``."""
        return self._dispatch.needs(peer)

    def members(self) -> frozenset[PeerId]:
        """Return the members that may be talked to now, this machine included."""
        return self.allow_list.members(trio.current_time())

    async def meet_more(self) -> None:
        """Try members that are not connected; for whom those that are know too little."""
        await self._bootstrap.meet_more()


@asynccontextmanager
async def open_node(options: NodeOptions) -> AsyncGenerator[Node]:
    """Run a node until the block ends.

    Raises:
        RosterUnavailable: There is no verified member list; nothing is served then.
        NotAMember: This machine is not on the list, or was taken from it meanwhile.
        SwarmSecretInvalid: The secret is not the swarm's.
        PortInUse: The listening address is taken.
        InvalidConfig: An address to listen on or to announce is none.
    """
    opened = open_node_backend(options.entry.backend_url, options.profile, options.identity)
    with opened as (client, service):
        async with _open_node(options, client) as node:
            if service is not None:
                await node.nursery.start(_host_backend, node, service)
            yield node


@asynccontextmanager
async def _open_node(options: NodeOptions, client: Backend) -> AsyncGenerator[Node]:
    allow_list = AllowList(max_stale_s=options.settings.max_stale_s)
    ask = partial(ask_members, options.profile, options.identity)
    held = await first_roster(client, options.swarm_id, allow_list, options.profile, ask=ask)
    ledger = _make_ledger(options, allow_list, held)

    def allow(peer: PeerId) -> bool:
        return allow_list.allows(peer, trio.current_time())

    if not allow(options.identity.peer_id):
        raise _not_a_member(options)
    with ungrouped_errors():
        async with (
            open_host(options.identity, listen=options.settings.listen, allow=allow) as host,
            open_traversal(host, options.traversal()) as traversal,
            trio.open_nursery() as nursery,
        ):
            yield await _start(options, host, traversal, nursery, ledger, client, allow)
            nursery.cancel_scope.cancel()


async def _start(
    options: NodeOptions,
    host: Host,
    traversal: Traversal,
    nursery: trio.Nursery,
    ledger: Ledger,
    client: Backend,
    allow: Callable[[PeerId], bool],
) -> Node:
    """Start what a node runs and connect it to a few members."""
    allow_list = ledger.allow_list
    if isinstance(client, PeerBackend):
        client.use_host(host)
    dispatch = _Dispatch()
    links = Links(host, options.link_secrets(), dispatch, make_ephemeral=options.make_ephemeral)
    dispatch.pings.use(links)
    await nursery.start(links.run)
    settings = options.settings
    sources = Sources(gossip=settings.gossip, table_requests=settings.table_requests)
    discovery = Discovery(host, options.swarm_id, allow, sources=sources)
    await nursery.start(discovery.run)
    meeting = Meeting(
        profile=options.profile,
        identity=options.identity,
        swarm_id=options.swarm_id,
        client=client,
        host=host,
        members=lambda: allow_list.members(trio.current_time()),
        announcements=discovery.announcements,
    )
    bootstrap = Bootstrap(meeting, settings.peers)
    keeper = _make_keeper(options, host, links, discovery, client, nursery, ledger)
    node = Node(
        options=options,
        host=host,
        links=links,
        discovery=discovery,
        traversal=traversal,
        contacts=bootstrap.contacts,
        allow_list=allow_list,
        keeper=keeper,
        nursery=nursery,
        started_at=trio.current_time(),
        _bootstrap=bootstrap,
        _dispatch=dispatch,
    )
    await nursery.start(keeper.run)
    nursery.start_soon(cut_when_expired, allow_list, partial(_cut_everybody, node))
    traversal.on_upgrade.append(lambda peer: nursery.start_soon(leave_relay, node, peer))
    await nursery.start(serve_reports, node)
    await bootstrap.start()
    nursery.start_soon(bootstrap.run)
    await _wait_for_secret(keeper)
    if settings.mdns:
        nursery.start_soon(_run_local_network, node, bootstrap)
    return node


async def _host_backend(
    node: Node,
    service: BackendService,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer members and strangers for the backend in this node's profile."""

    async def follow() -> None:
        try:
            await node.keeper.poll_once()
        except PalsError as error:
            _log.warning("the member list could not be renewed: %s", error)

    options = node.options
    await run_hosting(
        service,
        options.profile,
        node.host,
        options.swarm_id,
        listen=options.settings.redeem_listen,
        on_change=follow,
        task_status=task_status,
    )


async def _run_local_network(node: Node, bootstrap: Bootstrap) -> None:
    """Tell the local network of this member, and meet those that are heard there."""
    # Its library is loaded by those that ask for it.
    from pals.net.mdns import LocalNetwork

    host = node.host
    swarm_id = node.options.swarm_id

    async def changed() -> None:
        await host.advertised.wait()

    network = LocalNetwork(swarm_id, host.peer_id, host.addresses, changed, bootstrap.hear)
    await network.run()


def _make_ledger(options: NodeOptions, allow_list: AllowList, held: Held) -> Ledger:
    """Return what is known at the start.

    Raises:
        SwarmSecretInvalid: The secret is not the one of its epoch.
    """
    roster = allow_list.roster
    assert roster is not None
    if options.entry.epoch == roster.epoch:
        try:
            check_secret(roster, roster.epoch, options.secret.reveal())
        except InvalidRecord:
            raise SwarmSecretInvalid(problem="not the one of this swarm") from None
    operator = load_operator(options.profile, options.entry)
    signers = (options.identity,) if operator is None else (operator, options.identity)
    ledger = Ledger(
        own=options.identity.peer_id,
        allow_list=allow_list,
        entries=held.entries,
        epoch=options.entry.epoch,
        signers=signers,
        rng=random.SystemRandom(),
    )
    ledger.renew(held.word, trio.current_time(), time.time())
    return ledger


def _make_keeper(
    options: NodeOptions,
    host: Host,
    links: Links,
    discovery: Discovery,
    client: Backend,
    nursery: trio.Nursery,
    ledger: Ledger,
) -> Keeper:
    """Return what keeps list and secret; whoever leaves the list loses all it has here."""

    def cut(peer: PeerId, problem: str) -> None:
        links.drop(peer, problem)
        discovery.forget(peer)
        nursery.start_soon(host.drop_peer, peer)

    around = Surroundings(
        profile=options.profile,
        identity=options.identity,
        client=client,
        host=host,
        poll_interval_s=options.settings.poll_interval_s,
        publish=discovery.publish_roster_news,
        cut=cut,
        end=lambda: nursery.start_soon(_end_membership, options),
        expect=links.expect,
        rekey=links.rekey,
    )
    keeper = Keeper(around, ledger, options.secret.reveal())
    discovery.on_roster_news = keeper.judge
    links.on_other_epoch = keeper.greet
    return keeper


async def _wait_for_secret(keeper: Keeper) -> None:
    """Give members a chance to hand over a secret that this machine missed."""
    with trio.move_on_after(FIRST_SECRET_S) as scope:
        await keeper.wait_for_secret()
    if scope.cancelled_caught:
        _log.warning("no member gave the swarm's new secret yet: no link is made until one does")


def _cut_everybody(node: Node) -> None:
    for peer in node.links.linked_peers() | node.host.connected_peers():
        _cut(node, peer, "the member list expired")


def _cut(node: Node, peer: PeerId, problem: str) -> None:
    node.links.drop(peer, problem)
    node.nursery.start_soon(node.host.drop_peer, peer)


async def leave_relay(node: Node, peer: PeerId) -> None:
    """Have the next session with ``peer`` take the direct connection that was made.

    A link stays on the connection that it began on, so it is ended between two sessions.
    """
    while node.needs(peer):  # noqa: ASYNC110 # nothing tells that a role's last session ended
        await trio.sleep(LEAVE_RELAY_S)
    node.links.drop(peer, "a direct connection takes the place of the relayed one")


async def _end_membership(options: NodeOptions) -> None:
    raise _not_a_member(options)


def _not_a_member(options: NodeOptions) -> NotAMember:
    return NotAMember(peer=short_id(options.identity.peer_id), swarm=options.entry.name)
