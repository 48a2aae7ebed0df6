"""What shards lately took for a token, asked for now and then and never waited for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from pals.driver.interface import HopReport
from pals.errors import PalsError

FRESH_S = 5.0


class ShardTimes:
    """The milliseconds of each shard for a token, by peer.

    Args:
        ask: Asks the shards of the last used chain.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        ask: Callable[[], Awaitable[Sequence[HopReport]]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._clock = clock
        self._known: dict[str, float] = {}
        self._asked_at = -FRESH_S
        self._asking: asyncio.Task[None] | None = None

    def refresh(self) -> None:
        """Ask again, unless that was done a moment ago."""
        now = self._clock()
        running = self._asking is not None and not self._asking.done()
        if not running and now - self._asked_at >= FRESH_S:
            self._asked_at = now
            self._asking = asyncio.create_task(self._update())

    def known(self) -> Mapping[str, float]:
        """Return what is known now."""
        return self._known

    async def _update(self) -> None:
        try:
            reports = await self._ask()
        except PalsError:  # a shard that is gone; the completion itself tells of that
            return
        self._known = {r.peer: r.step_ms + r.queue_ms + r.handover_ms + r.codec_ms for r in reports}
