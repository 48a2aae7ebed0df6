"""Events and finished steps on their way from the compute thread to the trio thread.

`trio.lowlevel.TrioToken.run_sync_soon` does the same by way of a task of trio's own and
more calls; a shard pays for this once in every step of every session.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import trio

from pals.engine.work import Delivery

_WAKES = 64
"""Bytes taken at once, each one a wake; those that are left only wake again."""


class Deliveries:
    """A queue from one thread to another, with a socket to wait on."""

    def __init__(self) -> None:
        self._waiting: deque[Delivery] = deque()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def deliver(self, delivery: Delivery) -> None:
        """Queue a delivery, on the compute thread; after `close` it goes nowhere."""
        self._waiting.append(delivery)
        # A socket that takes no more wakes has some that are not read; a closed one has nobody.
        with suppress(OSError):
            self._writer.send(b"\0")

    async def run(self, take: Callable[[Delivery], None]) -> None:
        """Call ``take`` with each delivery, in order, until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self._reader)
            with suppress(BlockingIOError):
                self._reader.recv(_WAKES)
            while self._waiting:
                take(self._waiting.popleft())

    def close(self) -> None:
        """Close the sockets; nobody is in `run` then."""
        self._reader.close()
        self._writer.close()
