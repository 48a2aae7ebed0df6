"""An orderly end on Ctrl-C, SIGTERM and SIGHUP."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import trio

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(slots=True)
class _Watch:
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    interrupted: bool = False

    async def run(self, signals: AsyncIterator[int]) -> None:
        async for _ in signals:
            self.interrupted = True
            self.scope.cancel()


async def run_until_signal(body: Callable[[], Awaitable[None]]) -> bool:
    """Run ``body``, cancel it on a signal, and return whether one came.

    Signals are still taken while ``body`` cleans up, so that a second one cannot break
    that off.
    """
    watch = _Watch()
    with trio.open_signal_receiver(*WATCHED) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.run, signals)
            with watch.scope:
                await body()
            nursery.cancel_scope.cancel()
    return watch.interrupted
