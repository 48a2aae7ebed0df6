"""One member machine on the network: host, links, discovery and the member list.

`open_node` starts everything in one nursery and stops it in order. The roles of the
process (a shard, a driver, or both) register with the node and are given the frames
that are theirs. Runs on the trio thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pals.config import NodeSettings, Profile, SwarmEntry, SwarmSecret
from pals.errors import InvalidConfig, InvalidFrame, NotAMember, PalsError
from pals.net.announce import useful_first
from pals.net.control import Control, decode_control
from pals.net.discovery import Discovery
from pals.net.handshake import LinkSecrets
from pals.net.host import Host, open_host, ungrouped_errors
from pals.net.links import Arrival, Links
from pals.net.membership import MembershipClient, cut_when_expired, first_roster, poll_roster
from pals.net.nat.traversal import Traversal, TraversalOptions, open_traversal
from pals.net.report import serve_reports
from pals.net.wire import CONTROL_SHAPE, Codec, FrameShape, Kind, Lane
from pals.swarm.allowlist import AllowList
from pals.swarm.hints import Contacts, open_usable_hints, sign_hint
from pals.swarm.identity import Identity
from pals.swarm.keys import epoch_prk
from pals.types import PeerId, SwarmId, short_id

_log = logging.getLogger(__name__)

HINT_INTERVAL_S = 120.0
BOOTSTRAP_DEADLINE_S = 5.0
LEAVE_RELAY_S = 1.0
MAX_BOOTSTRAP_PEERS = 8


class Role(Protocol):
    """What a process does on the network; see `ShardService` and `SessionClient`."""

    @property
    def input_kind(self) -> Kind:
        """The kind of rows that are this role's."""
        ...

    def accepted(self, lane: Lane) -> tuple[FrameShape, ...]: ...

    def on_control(self, peer: PeerId, message: Control) -> None: ...

    def on_rows(self, peer: PeerId, arrival: Arrival) -> None: ...

    def needs(self, peer: PeerId) -> bool: ...

    def on_peer_lost(self, peer: PeerId, problem: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeOptions:
    """What a node is made of.

    Attributes:
        profile: Where the last verified roster is kept.
        entry: The swarm, from the profile.
        secret: The swarm secret of the current epoch.
        identity: This machine's identity.
        settings: Addresses, peers and intervals.
        make_ephemeral: Source of the links' X25519 keys.
    """

    profile: Profile
    entry: SwarmEntry
    secret: SwarmSecret
    identity: Identity
    settings: NodeSettings
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

    def accepted(self, peer: PeerId, lane: Lane) -> tuple[FrameShape, ...]:
        if lane is Lane.CONTROL:
            return (CONTROL_SHAPE,)
        return tuple(shape for role in self.roles for shape in role.accepted(lane))

    def on_frame(self, peer: PeerId, arrival: Arrival) -> None:
        frame = arrival.frame
        if frame.shape.kind is Kind.CONTROL:
            message = decode_control(peer, frame.payload)
            for role in self.roles:
                role.on_control(peer, message)
            return
        for role in self.roles:
            if role.input_kind is frame.shape.kind:
                role.on_rows(peer, arrival)
                return
        raise InvalidFrame(peer=peer, problem=f"rows of kind {frame.shape.kind.name.lower()}")

    def needs(self, peer: PeerId) -> bool:
        return any(role.needs(peer) for role in self.roles)

    def on_link_lost(self, peer: PeerId, problem: str) -> None:
        for role in self.roles:
            role.on_peer_lost(peer, problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A running member; made by `open_node`."""

    options: NodeOptions
    host: Host
    links: Links
    discovery: Discovery
    traversal: Traversal
    contacts: Contacts
    allow_list: AllowList
    nursery: trio.Nursery
    _dispatch: _Dispatch

    @property
    def peer_id(self) -> PeerId:
        return self.host.peer_id

    def add_role(self, role: Role) -> None:
        self._dispatch.roles.append(role)

    def needs(self, peer: PeerId) -> bool:
        """Return whether anything would be lost now with the links to ``peer``."""
        return self._dispatch.needs(peer)

    def members(self) -> frozenset[PeerId]:
        """Return the members that may be talked to now, this machine included."""
        return self.allow_list.members(trio.current_time())


@asynccontextmanager
async def open_node(options: NodeOptions) -> AsyncGenerator[Node]:
    """Run a node until the block ends.

    Raises:
        RosterUnavailable: There is no verified member list; nothing is served then.
        NotAMember: This machine is not on the list, or was taken from it meanwhile.
        PortInUse: The listening address is taken.
        InvalidConfig: An address to listen on or to announce is none.
    """
    allow_list = AllowList()
    client = MembershipClient(options.entry.backend_url)
    await first_roster(client, options.swarm_id, allow_list, options.profile)

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
            yield await _start(options, host, traversal, nursery, allow_list, client, allow)
            nursery.cancel_scope.cancel()


async def _start(
    options: NodeOptions,
    host: Host,
    traversal: Traversal,
    nursery: trio.Nursery,
    allow_list: AllowList,
    client: MembershipClient,
    allow: Callable[[PeerId], bool],
) -> Node:
    """Start what a node runs and connect it to a few members."""
    dispatch = _Dispatch()
    links = Links(host, options.link_secrets(), dispatch, make_ephemeral=options.make_ephemeral)
    await nursery.start(links.run)
    discovery = Discovery(host, options.swarm_id, allow)
    await nursery.start(discovery.run)
    node = Node(
        options=options,
        host=host,
        links=links,
        discovery=discovery,
        traversal=traversal,
        contacts=Contacts(_named_peers(options)),
        allow_list=allow_list,
        nursery=nursery,
        _dispatch=dispatch,
    )
    nursery.start_soon(_poll, node, client, options)
    nursery.start_soon(cut_when_expired, allow_list, partial(_cut_everybody, node))
    traversal.on_upgrade.append(lambda peer: nursery.start_soon(leave_relay, node, peer))
    await nursery.start(serve_reports, node)
    await _meet(node, client, options)
    nursery.start_soon(_keep_meeting, node, client, options)
    return node


async def _poll(node: Node, client: MembershipClient, options: NodeOptions) -> None:
    """Follow the member list; whoever leaves it loses connections, links and sessions."""

    def on_change(removed: frozenset[PeerId], _added: frozenset[PeerId]) -> None:
        if node.peer_id in removed:
            # The poller outlives every error of its own, so another task has to end the node.
            node.nursery.start_soon(_end_membership, options)
        for peer in removed - {node.peer_id}:
            _log.info("peer %s is no longer a member", short_id(peer))
            _cut(node, peer, "it is no longer a member")

    await poll_roster(
        client,
        options.swarm_id,
        node.allow_list,
        options.profile,
        interval=options.settings.poll_interval_s,
        on_change=on_change,
    )


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


async def _keep_meeting(node: Node, client: MembershipClient, options: NodeOptions) -> None:
    """Renew this machine's address hint, and look for members that are not connected."""
    while True:
        with trio.move_on_after(HINT_INTERVAL_S):
            await node.host.advertised.wait()
        await _meet(node, client, options)


async def _meet(node: Node, client: MembershipClient, options: NodeOptions) -> None:
    """Say where this machine listens, and connect to a few members."""
    now = int(time.time())
    hint = sign_hint(
        options.identity,
        swarm_id=options.swarm_id,
        addresses=useful_first(node.host.addresses()),
        issued_at=now,
    )
    # Peers named by --peer still work without the backend, and hints without one's own.
    with _logged("this machine's address hint was not left"):
        await client.put_hint(options.swarm_id, hint)
    with _logged("no address hints"):
        hints = await client.fetch_hints(options.swarm_id)
        read = partial(open_usable_hints, hints, swarm_id=options.swarm_id, now_unix=now)
        members = node.members()
        for opened in await trio.to_thread.run_sync(read):
            if opened.peer in members:
                node.contacts.learn(opened)
    await _connect_to_some(node, node.contacts)


@contextmanager
def _logged(what: str) -> Generator[None]:
    try:
        yield
    except PalsError as error:
        _log.info("%s: %s", what, error)


async def _connect_to_some(node: Node, contacts: Contacts) -> None:
    """Connect until enough are, and to one more each time, so that parted groups meet."""
    connected = node.host.connected_peers()
    count = max(1, MAX_BOOTSTRAP_PEERS - len(connected))
    wanted = node.members() - connected - {node.peer_id}
    async with trio.open_nursery() as nursery:
        for peer in contacts.choose(wanted, count):
            nursery.start_soon(_try_connect, node, peer, contacts)


async def _try_connect(node: Node, peer: PeerId, contacts: Contacts) -> None:
    try:
        addresses = contacts.addresses(peer)
        await node.host.connect(peer, addresses, deadline_s=BOOTSTRAP_DEADLINE_S)
    except PalsError as error:
        contacts.failed(peer)
        _log.info("peer %s: %s", short_id(peer), error)
    else:
        contacts.reached(peer)


def _named_peers(options: NodeOptions) -> dict[PeerId, tuple[str, ...]]:
    named: dict[PeerId, tuple[str, ...]] = {}
    for address in options.settings.peers:
        peer = peer_in(address)
        named[peer] = (*named.get(peer, ()), address)
    return named


def peer_in(address: str) -> PeerId:
    """Return the peer id that ends a multiaddr.

    Raises:
        InvalidConfig: It does not end in ``/p2p/<peer id>``.
    """
    _, separator, peer = address.rpartition("/p2p/")
    if not separator or "/" in peer or not peer:
        raise InvalidConfig(
            source=f"peer `{address}`",
            problem="it does not end in `/p2p/<peer id>`",
            advice="copy the whole address that `pals shard` prints on the other machine",
        )
    return PeerId(peer)
