"""An orderly end on Ctrl-C, SIGTERM and SIGHUP.

Ctrl-C ends a command with status 130. SIGTERM and SIGHUP ask a server to stop, and one
that did as it was asked ends with 0. A server that others depend on first hands over what
it serves; a second signal ends it at once.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import NoReturn

import trio

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _cancel_at_once() -> bool:
    return False


@dataclass(slots=True)
class _Watch:
    on_signal: Callable[[], bool]
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    received: signal.Signals | None = None

    async def run(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            self.received = self.received or signal.Signals(number)
            if not self.on_signal():
                self.scope.cancel()


async def run_until_signal(
    body: Callable[[], Awaitable[None]], *, on_signal: Callable[[], bool] = _cancel_at_once
) -> signal.Signals | None:
    """Run ``body``, cancel it on a signal, and return the first one that came.

    Signals are still taken while ``body`` cleans up, so that a second one cannot break
    that off.

    Args:
        body: What runs.
        on_signal: Called on each signal; returns True when ``body`` then ends by itself.
    """
    watch = _Watch(on_signal)
    with trio.open_signal_receiver(*WATCHED) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.run, signals)
            with watch.scope:
                await body()
            nursery.cancel_scope.cancel()
    return watch.received


def raise_interrupt(received: signal.Signals | None) -> None:
    """Raise `KeyboardInterrupt` when a server was ended by Ctrl-C."""
    if received is signal.SIGINT:
        raise KeyboardInterrupt


@contextmanager
def exiting_on_termination(status: int = 0) -> Generator[None]:
    """Let SIGTERM and SIGHUP unwind the main thread, which then exits.

    For servers on uvicorn: it ends by itself on SIGTERM, and then raises that signal
    again, which by default kills the process before anything else is closed.

    Args:
        status: To exit with; 0 for a server, which did as it was asked.
    """

    def leave(_number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(status)

    def terminate(_number: int, _frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGTERM)

    handlers = {signal.SIGTERM: leave, signal.SIGHUP: terminate}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
