"""Round trips of one small sealed message over links: what `pals ping` measures."""

from __future__ import annotations

from contextlib import suppress
from itertools import count
from typing import Protocol

import trio

from pals.errors import PalsError, PeerUnreachable
from pals.net.control import Ping, Pong, encode_control
from pals.net.wire import CONTROL_SHAPE, NO_ROWS, Lane, Outgoing
from pals.types import PeerId


class _Links(Protocol):
    def send(self, peer: PeerId, lane: Lane, outgoing: Outgoing) -> None: ...


class Pings:
    """Answers the pings of linked members, and waits for the answers to its own."""

    def __init__(self) -> None:
        self._links: _Links | None = None
        self._numbers = count()
        self._awaited: dict[tuple[PeerId, int], trio.Event] = {}

    def use(self, links: _Links) -> None:
        """Send over these links from now on."""
        self._links = links

    def take(self, peer: PeerId, message: Ping | Pong) -> None:
        """Answer a ping, or note an answer; one that nobody waits for is ignored."""
        if isinstance(message, Ping):
            with suppress(PalsError):  # the link has just ended: nobody waits any more
                self._send(peer, Pong(number=message.number))
            return
        answered = self._awaited.get((peer, message.number))
        if answered is not None:
            answered.set()

    async def round_trip_s(self, peer: PeerId, *, deadline_s: float) -> float:
        """Return the seconds that one message takes to a linked peer and back.

        Raises:
            PeerUnreachable: There is no link with it, or no answer within ``deadline_s``.
            QueueFull: It reads too slowly.
        """
        key = peer, next(self._numbers)
        answered = self._awaited[key] = trio.Event()
        started = trio.current_time()
        try:
            self._send(peer, Ping(number=key[1]))
            with trio.move_on_after(deadline_s):
                await answered.wait()
                return trio.current_time() - started
        finally:
            del self._awaited[key]
        raise PeerUnreachable(peer=peer, problem=f"no answer within {deadline_s:g} s")

    def _send(self, peer: PeerId, message: Ping | Pong) -> None:
        assert self._links is not None
        outgoing = Outgoing(CONTROL_SHAPE, NO_ROWS, (encode_control(message),))
        self._links.send(peer, Lane.CONTROL, outgoing)
