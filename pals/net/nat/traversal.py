"""How members reach each other: what each tries, in which order, and what it tells.

`Traversal` is what the host asks where dialling fails. It meets the peer at a member that
both are connected to and punches; when that fails, it goes through one that relays. It
also keeps the port forward of the router, and finds out which addresses to announce.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import trio

from pals.errors import NoPath, PalsError, PeerUnreachable, RelayRefused
from pals.net.host import Host, Stream
from pals.net.nat.addresses import Endpoint, is_inside, read_announced
from pals.net.nat.asking import SeenService, ask_member
from pals.net.nat.conversation import end_stream
from pals.net.nat.limits import RelayLimits
from pals.net.nat.meeting import Meeter, MeetingService, Place
from pals.net.nat.messages import STAY_PROTOCOL
from pals.net.nat.reachability import Reachability
from pals.net.nat.relay import RelayService, RelayUser
from pals.net.nat.upnp import Gateway, PortForward, UpnpGateway
from pals.types import PeerId, short_id

_log = logging.getLogger(__name__)

MEMBERS_ASKED = 3
FIRST_PAUSE_S = 0.2
"""Seconds from the first connection to asking, in which others may come."""
ASK_AGAIN_S = 300.0
ASK_PAUSE_S = 2.0
"""Seconds from a change of this machine's ports or places to asking about it."""
PUNCH_AGAIN_S = 60.0
"""Seconds in which a punch that failed is not tried anew before a relay is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraversalOptions:
    """What this machine's user lets it do to be reached.

    Attributes:
        announced: Addresses that the user forwards to this machine.
        upnp: Ask the router to forward the listening port.
        allow_relay: Carry other members' circuits.
        use_relay: Be at an end of circuits.
        limits: What is spent on circuits of others.
        upgrade_s: Seconds between tries to punch past a relay, twice as many after each
            that failed, up to `MAX_UPGRADE_S`.
        make_gateway: Makes what speaks to the router.
        rng: Chooses external ports.
    """

    announced: tuple[str, ...] = ()
    upnp: bool = True
    allow_relay: bool = False
    use_relay: bool = False
    limits: RelayLimits = field(default_factory=RelayLimits)
    upgrade_s: float = 30.0
    make_gateway: Callable[[], Gateway] = UpnpGateway
    rng: random.Random = field(default_factory=random.Random)


MAX_UPGRADE_S = 600.0


class Traversal:
    """Finds ways to members that cannot be dialled; made by `open_traversal`."""

    def __init__(self, host: Host, options: TraversalOptions, nursery: trio.Nursery) -> None:
        self._host = host
        self._options = options
        self._nursery = nursery
        self.state = Reachability(
            local=host.peer_id,
            listening=host.listening(),
            announced=tuple(map(read_announced, options.announced)),
        )
        self.relay = RelayService(host, allowed=options.allow_relay, limits=options.limits)
        self._user = RelayUser(host, wanted=options.use_relay, nursery=nursery)
        self._meeter = Meeter(host, self.state.punching_endpoints, nursery)
        self.asked = trio.Event()
        """Set once the first members were asked how they see this machine."""
        self._changed = trio.Event()
        self._locks: WeakValueDictionary[PeerId, trio.Lock] = WeakValueDictionary()
        self._failed_s: dict[PeerId, float] = {}
        self._staying: set[PeerId] = set()
        self.on_upgrade: list[Callable[[PeerId], None]] = []
        """Told a peer that a direct connection was made to beside a relayed one."""

    def start(self) -> None:
        """Serve what members ask, and begin to find out this machine's addresses."""
        SeenService(self._host).start()
        MeetingService(self._host, relays=lambda: self._options.allow_relay).start()
        self._host.handle(STAY_PROTOCOL, _let_stay)
        self.relay.start()
        self._user.start()
        self._meeter.start()
        self._host.set_detour(self.reach)
        self._host.on_connection(self._on_connection)
        self._tell()
        self._nursery.start_soon(self._keep_asking)
        port = self._port_to_forward()
        if port is not None:
            forward = PortForward(
                port, self._options.make_gateway, self._on_mapped, self._options.rng
            )
            self._nursery.start_soon(forward.run)

    # --- reaching peers --------------------------------------------------------------

    async def reach(self, peer: PeerId, meeting: tuple[PeerId, ...] = ()) -> None:
        """Connect to a member that cannot be dialled: punch, else go through a relay.

        Args:
            peer: The member.
            meeting: Members at which it says it can be met; they are dialled first.

        Raises:
            NoPath: It is connected to a member that this one knows, and still cannot be
                reached.
            PeerUnreachable: No connected member knows it either.
        """
        async with self._locks.setdefault(peer, trio.Lock()):
            if self._host.path(peer) is not None:
                return
            await self._go_to(peer, meeting)
            places = await self._meeter.find(peer, self._direct_members(peer, meeting))
            try:
                await self._reach_at(peer, places)
            finally:
                await _leave(places)

    async def _reach_at(self, peer: PeerId, places: list[Place]) -> None:
        if not places:
            problem = "no address answers, and no connected member is connected to it"
            raise PeerUnreachable(peer=peer, problem=problem)
        since_s = trio.current_time() - self._failed_s.get(peer, -PUNCH_AGAIN_S)
        punched = f"failed {since_s:.0f} s ago"
        if since_s >= PUNCH_AGAIN_S:
            punched = await self._try_punch(peer, places)
            if not punched:
                return
        relayed = await self._try_relays(peer, places)
        if relayed:
            dialled = "no address answers"
            raise NoPath(peer=peer, dialled=dialled, punched=punched, relayed=relayed)

    async def _try_punch(self, peer: PeerId, places: list[Place]) -> str:
        """Punch by way of the nearest place; return why it failed, if it did."""
        try:
            await self._meeter.punch(peer, places[0])
        except PalsError as error:
            self._failed_s[peer] = trio.current_time()
            return f"by way of {short_id(places[0].member)}: {_problem(error)}"
        self._failed_s.pop(peer, None)
        _log.info("punched through to peer %s", short_id(peer))
        return ""

    async def _try_relays(self, peer: PeerId, places: list[Place]) -> str:
        """Go through the nearest member that relays; return why it failed, if it did."""
        if not self._options.use_relay:
            return "this machine was started without `--use-relay`"
        problem = "no member that both are connected to was started with `--allow-relay`"
        for place in places:
            if not place.relays:
                continue
            try:
                await self._user.connect(peer, place.member)
            except (RelayRefused, PeerUnreachable) as error:
                problem = f"{short_id(place.member)}: {_problem(error)}"
            else:
                _log.info("peer %s is reached through %s", short_id(peer), short_id(place.member))
                self._nursery.start_soon(self._keep_upgrading, peer)
                return ""
        return problem

    async def _go_to(self, peer: PeerId, meeting: tuple[PeerId, ...]) -> None:
        """Connect to the members at which ``peer`` says it can be met."""

        async def go(member: PeerId) -> None:
            try:
                await self._host.connect_directly(member)
            except PeerUnreachable as error:
                _log.debug("no meeting at %s: %s", short_id(member), error)

        async with trio.open_nursery() as nursery:
            for member in meeting:
                if member not in (peer, self._host.peer_id) and self._host.is_member(member):
                    nursery.start_soon(go, member)

    def _direct_members(self, peer: PeerId, first: tuple[PeerId, ...]) -> list[PeerId]:
        """Return the directly connected members, those of ``first`` before the others."""
        connected = self._host.connected_peers() - {peer}
        direct = [m for m in sorted(connected) if self._host.observed(m)]
        return sorted(direct, key=lambda member: member not in first)

    async def _keep_upgrading(self, peer: PeerId) -> None:
        """Try to punch past a relay until a direct connection is there, or none is."""
        interval_s = self._options.upgrade_s
        while True:
            await trio.sleep(interval_s)
            path = self._host.path(peer)
            if path is None or path.kind != "relayed":
                break
            places = await self._meeter.find(peer, self._direct_members(peer, ()))
            try:
                if places and not await self._try_punch(peer, places):
                    break
            finally:
                await _leave(places)
            interval_s = min(2 * interval_s, MAX_UPGRADE_S)
        if self._host.path(peer) is not None:
            await self._host.drop_idle_relayed(peer)
            for callback in self.on_upgrade:
                callback(peer)

    # --- this machine's addresses ----------------------------------------------------

    async def _keep_asking(self) -> None:
        """Ask members anew from time to time, and when something changed."""
        while True:
            changed = self._changed
            asked = await self._ask_some()
            with trio.move_on_after(ASK_AGAIN_S if asked else math.inf):
                await changed.wait()
                await trio.sleep(ASK_PAUSE_S if asked else FIRST_PAUSE_S)

    async def _ask_some(self) -> int:
        """Ask a few members, and return how many there were to ask.

        Those outside this machine's network know what the others cannot.
        """
        members = self._direct_members(self._host.peer_id, ())
        members.sort(key=lambda m: all(is_inside(e.ip) for e in self._host.observed(m)))
        members = members[:MEMBERS_ASKED]

        async def ask(member: PeerId) -> None:
            try:
                report = await ask_member(self._host, member, self.state.ports_to_try())
            except PalsError as error:
                _log.debug("peer %s does not say how it sees us: %s", short_id(member), error)
            else:
                self.state.record(member, report)

        async with trio.open_nursery() as nursery:
            for member in members:
                nursery.start_soon(ask, member)
        if members:
            self._tell()
            self.asked.set()
        if self.state.reach == "private":
            for member in set(members) - self._staying:
                self._nursery.start_soon(self._stay, member)
        return len(members)

    async def _stay(self, member: PeerId) -> None:
        """Keep connected to a member at which others can meet this machine.

        One connection leaves by the listening port, so that the member sees the NAT's
        mapping of it, and tells it to whom this machine meets there.
        """
        self._staying.add(member)
        streams: list[Stream] = []
        try:
            try:
                await self._host.connect_from_port(member)
            except PeerUnreachable as error:
                _log.debug("peer %s does not see our port: %s", short_id(member), error)
            streams = await self._host.open_on_each(member, STAY_PROTOCOL)
            async with trio.open_nursery() as nursery:
                for stream in streams:
                    nursery.start_soon(_until_ended, stream, nursery.cancel_scope)
        except PeerUnreachable as error:
            _log.debug("peer %s is no place to meet: %s", short_id(member), error)
        finally:
            self._staying.discard(member)
            for stream in streams:
                await end_stream(stream)
        self._ask_soon()

    def _on_connection(self, peer: PeerId) -> None:
        if self.state.reach == "unknown" and any(
            not is_inside(e.ip) or not self.asked.is_set() for e in self._host.observed(peer)
        ):
            self._ask_soon()

    def _ask_soon(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _port_to_forward(self) -> int | None:
        """Return the port to ask the router for, if it could be of any use."""
        inside = [e for e in self.state.listening if not e.is_ipv6 and is_inside(e.ip)]
        private = [e.port for e in inside if not e.ip.startswith("127.")]
        return private[0] if private and self._options.upnp else None

    def _on_mapped(self, mapped: Endpoint | None) -> None:
        _log.info("the router forwards %s", mapped or "nothing any more")
        self.state.mapped = mapped
        self._tell()
        self._ask_soon()

    def _tell(self) -> None:
        self.state.listening = self._host.listening()
        places = self._direct_members(self._host.peer_id, ())
        self._host.advertise(self.state.addresses(places))


@asynccontextmanager
async def open_traversal(host: Host, options: TraversalOptions) -> AsyncGenerator[Traversal]:
    """Find ways to members, and let members find ways, until the block ends.

    Raises:
        InvalidConfig: An announced address is none.
    """
    async with trio.open_nursery() as nursery:
        traversal = Traversal(host, options, nursery)
        traversal.start()
        try:
            yield traversal
        finally:
            host.set_detour(None)
            nursery.cancel_scope.cancel()


async def _let_stay(stream: Stream) -> None:
    await stream.read_some(1)


async def _until_ended(stream: Stream, scope: trio.CancelScope) -> None:
    with suppress(PeerUnreachable):
        await stream.read_some(1)
    scope.cancel()


async def _leave(places: list[Place]) -> None:
    for place in places:
        await end_stream(place.stream)


def _problem(error: PalsError) -> str:
    return str(error.fields.get("problem", error))
