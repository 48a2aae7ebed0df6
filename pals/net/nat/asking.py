"""Asking members where they see this machine, and answering them.

A member that is asked dials back only to the address that the question came from, so
nobody can have it dial a third party.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

from pals.net.host import Host, Stream
from pals.net.nat.addresses import Endpoint
from pals.net.nat.conversation import end_stream, endpoint_from, read_expected, send_message
from pals.net.nat.limits import PeerAllowances
from pals.net.nat.messages import (
    SEEN_PROTOCOL,
    Ask,
    Refused,
    Seen,
)
from pals.net.nat.reachability import Report
from pals.types import PeerId

ASK_DEADLINE_S = 8.0
DIAL_BACK_S = 3.0
ASKS_PER_S = 1 / 20
ASKS_AT_ONCE = 4
DIALS_BACK_AT_ONCE = 4


async def ask_member(host: Host, member: PeerId, ports: Sequence[int]) -> Report:
    """Ask a connected member from where it sees this machine, and to dial it at ``ports``.

    Raises:
        PeerUnreachable: It does not answer, or not now.
        InvalidFrame: It answers with something else.
    """
    stream = await host.open_stream(member, SEEN_PROTOCOL, connected_only=True)
    try:
        await send_message(stream, Ask(ports=tuple(ports)))
        answer = await read_expected(stream, Seen, within_s=ASK_DEADLINE_S)
    finally:
        await end_stream(stream)
    observed = endpoint_from(stream, answer.observed)
    asked = frozenset(ports)
    return Report(observed, asked, asked & set(answer.reached), trio.current_time())


class SeenService:
    """Answers members that ask where they are seen from."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._asks = PeerAllowances(rate=ASKS_PER_S, burst=ASKS_AT_ONCE)
        self._dials = trio.CapacityLimiter(DIALS_BACK_AT_ONCE)

    def start(self) -> None:
        self._host.handle(SEEN_PROTOCOL, self._serve)

    async def _serve(self, stream: Stream) -> None:
        question = await read_expected(stream, Ask)
        observed = self._host.observed(stream.peer_id)
        if not self._asks.try_take(stream.peer_id, trio.current_time()):
            await send_message(stream, Refused("asked too often"))
        elif not observed:
            await send_message(stream, Refused("you come through a relay"))
        else:
            reached = await self._dial_back(stream.peer_id, observed[0].ip, question.ports)
            await send_message(stream, Seen(observed=str(observed[0]), reached=reached))

    async def _dial_back(self, peer: PeerId, ip: str, ports: Sequence[int]) -> tuple[int, ...]:
        """Return those of ``ports`` at which ``peer`` itself answers."""
        reached: set[int] = set()

        async def dial(port: int) -> None:
            async with self._dials:
                if await self._host.is_at(peer, Endpoint(ip, port)):
                    reached.add(port)

        with trio.move_on_after(DIAL_BACK_S):
            async with trio.open_nursery() as nursery:
                for port in ports:
                    nursery.start_soon(dial, port)
        return tuple(port for port in ports if port in reached)
