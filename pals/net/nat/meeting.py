"""Hole punching with a member as the meeting point.

The dialler asks members that it is connected to whether they are connected to the peer.
Through one that is, both tell each other where they may be found, and then both dial at
the same moment, from the ports at which they listen: each NAT sees an outgoing
connection first, and lets the other's in. One end of the socket that comes of it acts
as the dialler, as DCUtR does it (libp2p specs, relay/DCUtR.md); unlike there, the
meeting point need not relay. Where only one of them is behind a NAT, that one's dial
reaches the other's listening socket, so it also dials as it would on its own account.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import trio
from libp2p.network.connection.raw_connection import RawConnection

from pals.errors import PalsError, PeerUnreachable
from pals.net.host import Host, Stream
from pals.net.nat.addresses import Endpoint, endpoints_in
from pals.net.nat.conversation import (
    end_stream,
    read_expected,
    send_message,
)
from pals.net.nat.limits import PeerAllowances
from pals.net.nat.messages import (
    MAX_OFFERED,
    MAX_PROBLEM_CHARS,
    MEET_PROTOCOL,
    MET_PROTOCOL,
    Go,
    Here,
    Meet,
    Met,
    Offer,
    Refused,
)
from pals.net.raw import dial_endpoint
from pals.types import PeerId, short_id

_log = logging.getLogger(__name__)

FIND_DEADLINE_S = 1.5
PUNCH_S = 3.0
"""A lost SYN is sent again after 1 s."""
RETRY_S = 0.25
MAX_PLACES = 8
MEETINGS_PER_S = 1 / 5
MEETINGS_AT_ONCE = 8
CALLS_PER_S = 2.0
CALLS_AT_ONCE = 32
"""Of one meeting member, whoever it says calls."""

Endpoints = Callable[[Sequence[Endpoint]], Sequence[Endpoint]]
"""Where a peer may find this machine, given how the meeting member sees it."""


@dataclass(frozen=True, slots=True)
class Place:
    """A member that is connected to the peer, and waits on ``stream``.

    Attributes:
        stream: On which the meeting goes on.
        observed: The endpoints that this machine comes from, as it sees them.
        relays: Whether it carries circuits.
    """

    stream: Stream
    observed: tuple[Endpoint, ...]
    relays: bool

    @property
    def member(self) -> PeerId:
        return self.stream.peer_id


class MeetingService:
    """Lets two members that this one is connected to meet."""

    def __init__(self, host: Host, *, relays: Callable[[], bool]) -> None:
        self._host = host
        self._relays = relays
        self._meetings = PeerAllowances(rate=MEETINGS_PER_S, burst=MEETINGS_AT_ONCE)

    def start(self) -> None:
        self._host.handle(MEET_PROTOCOL, self._serve)

    async def _serve(self, source: Stream) -> None:
        question = await read_expected(source, Meet)
        peer = PeerId(question.target)
        own = self._host.observed(source.peer_id)
        other = self._host.observed(peer) if self._host.is_member(peer) else ()
        if not own or not other or peer == source.peer_id:
            await send_message(source, Refused("not directly connected to it"))
            return
        await send_message(source, Here(observed=_told(own), relays=self._relays()))
        try:
            await self._introduce(source, peer)
        except PeerUnreachable as error:
            problem = str(error.fields["problem"])[:MAX_PROBLEM_CHARS]
            with suppress(PeerUnreachable):  # it met at another place, or did not need to
                await send_message(source, Refused(problem))

    async def _introduce(self, source: Stream, peer: PeerId) -> None:
        """Tell each where the other may be found, at addresses that it was seen at."""
        offer = await read_expected(source, Offer)
        if not self._meetings.try_take(source.peer_id, trio.current_time()):
            await send_message(source, Refused("too many meetings"))
            return
        target = await self._host.open_stream(peer, MET_PROTOCOL, connected_only=True)
        try:
            own, other = self._host.observed(source.peer_id), self._host.observed(peer)
            addresses = _seen(offer.addresses, own)
            met = Met(source=source.peer_id, observed=_told(other), addresses=addresses)
            await send_message(target, met)
            answer = await read_expected(target, Offer)
            await send_message(source, Offer(addresses=_seen(answer.addresses, other)))
            await send_message(target, await read_expected(source, Go))
        finally:
            with trio.move_on_after(1.0, shield=True):
                await target.close()


class Meeter:
    """The two that meet: goes to meetings, and comes when called.

    Args:
        host: This member.
        endpoints: Where others may find it.
        nursery: Where the connections that it takes live.
    """

    def __init__(self, host: Host, endpoints: Endpoints, nursery: trio.Nursery) -> None:
        self._host = host
        self._endpoints = endpoints
        self._nursery = nursery
        self._called = PeerAllowances(rate=MEETINGS_PER_S, burst=MEETINGS_AT_ONCE)
        self._calls = PeerAllowances(rate=CALLS_PER_S, burst=CALLS_AT_ONCE)
        self._waiting: dict[PeerId, trio.Event] = {}

    def start(self) -> None:
        self._host.handle(MET_PROTOCOL, self._serve)
        self._host.on_connection(self._on_connection)

    def _on_connection(self, peer: PeerId) -> None:
        if peer in self._waiting:
            self._waiting[peer].set()

    # --- the dialler -----------------------------------------------------------------

    async def find(self, peer: PeerId, members: Sequence[PeerId]) -> list[Place]:
        """Return those of connected ``members`` that are connected to ``peer``, nearest first.

        Whoever gets the places ends their streams.
        """
        places: list[Place] = []

        async def ask(member: PeerId) -> None:
            try:
                places.append(await self._ask(member, peer))
            except PalsError as error:
                _log.debug("no meeting at %s: %s", short_id(member), error)

        with trio.move_on_after(FIND_DEADLINE_S):
            async with trio.open_nursery() as nursery:
                for member in members[:MAX_PLACES]:
                    nursery.start_soon(ask, member)
        return places

    async def _ask(self, member: PeerId, peer: PeerId) -> Place:
        stream = await self._host.open_stream(member, MEET_PROTOCOL, connected_only=True)
        try:
            await send_message(stream, Meet(target=peer))
            answer = await read_expected(stream, Here)
            return Place(stream, endpoints_in(answer.observed), answer.relays)
        except BaseException:
            await end_stream(stream)
            raise

    async def punch(self, peer: PeerId, place: Place) -> None:
        """Meet ``peer`` at ``place`` and connect to it through both NATs.

        Raises:
            PeerUnreachable: It did not come, or no dial got through in time.
            InvalidFrame: The meeting member says what it must not.
        """
        own = self._endpoints(place.observed)
        offered = Offer(addresses=_told(own))
        started_s = trio.current_time()
        await send_message(place.stream, offered)
        answer = await read_expected(place.stream, Offer)
        round_trip_s = trio.current_time() - started_s
        await send_message(place.stream, Go())
        await trio.sleep(round_trip_s / 2)  # the other side hears of it now
        if not await self._dial_all(peer, endpoints_in(answer.addresses)):
            raise PeerUnreachable(peer=peer, problem=f"no hole within {PUNCH_S:g} s")

    async def _dial_all(self, peer: PeerId, endpoints: Sequence[Endpoint]) -> bool:
        """Dial for a while, and return whether a direct connection came, either way."""
        try:
            with trio.move_on_after(PUNCH_S):
                async with trio.open_nursery() as nursery:
                    for endpoint in endpoints:
                        nursery.start_soon(self._dial_as_initiator, peer, endpoint)
                    while not self._host.observed(peer):
                        self._waiting[peer] = trio.Event()
                        await self._waiting[peer].wait()
                    nursery.cancel_scope.cancel()
        finally:
            self._waiting.pop(peer, None)
        return bool(self._host.observed(peer))

    async def _dial_as_initiator(self, peer: PeerId, endpoint: Endpoint) -> None:
        while True:
            raw = await self._dial(endpoint)
            with suppress(PeerUnreachable):
                await self._host.secure_outbound(raw, peer)
                return
            await trio.sleep(RETRY_S)

    # --- the one that is called ------------------------------------------------------

    async def _serve(self, stream: Stream) -> None:
        met = await read_expected(stream, Met)
        source = PeerId(met.source)
        if not self._host.is_member(source):
            await send_message(stream, Refused("the caller is not a member"))
            return
        now_s = trio.current_time()
        if not (
            self._calls.try_take(stream.peer_id, now_s) and self._called.try_take(source, now_s)
        ):
            await send_message(stream, Refused("called too often"))
            return
        own = self._endpoints(endpoints_in(met.observed))
        await send_message(stream, Offer(addresses=_told(own)))
        await read_expected(stream, Go)
        for endpoint in endpoints_in(met.addresses):
            self._nursery.start_soon(self._dial_plainly, source, endpoint)
            self._nursery.start_soon(self._answer, endpoint)

    async def _dial_plainly(self, peer: PeerId, endpoint: Endpoint) -> None:
        """Dial an endpoint of the caller, which may be behind no NAT, from another port."""
        with trio.move_on_after(PUNCH_S), suppress(OSError, PeerUnreachable):
            await self._host.secure_outbound(await dial_endpoint(endpoint), peer)

    async def _answer(self, endpoint: Endpoint) -> None:
        """Dial an endpoint of the caller for a while, and serve what comes of it."""
        with trio.move_on_after(PUNCH_S) as scope:
            raw = await self._dial(endpoint)
            scope.deadline = float("inf")
            await self._host.serve_inbound(raw, str(endpoint))

    async def _dial(self, endpoint: Endpoint) -> RawConnection:
        """Dial from the listening port until somebody answers."""
        while True:
            for source in self._host.bound():
                if source.is_ipv6 != endpoint.is_ipv6:
                    continue
                try:
                    return await dial_endpoint(endpoint, source=source)
                except OSError as error:
                    _log.debug("punching to %s: %s", endpoint, error)
            await trio.sleep(RETRY_S)


def _seen(addresses: Sequence[str], observed: Sequence[Endpoint]) -> tuple[str, ...]:
    """Leave out what would have a member dial somebody else than the peer it meets."""
    ips = {endpoint.ip for endpoint in observed}
    return _told([endpoint for endpoint in endpoints_in(addresses) if endpoint.ip in ips])


def _told(endpoints: Sequence[Endpoint]) -> tuple[str, ...]:
    return tuple(map(str, endpoints))[:MAX_OFFERED]
