from __future__ import annotations

import asyncio
from collections.abc import Sequence

from pals.driver.interface import HopReport
from pals.driver.shard_times import FRESH_S, ShardTimes
from pals.errors import ShardLost
from tests.unit.driver.local_world import run


class Shards:
    """Answers reports, the next of which is slower by a millisecond, or fails."""

    def __init__(self) -> None:
        self.asked = 0
        self.answered = asyncio.Event()
        self.failing = False

    async def report(self) -> Sequence[HopReport]:
        self.asked += 1
        self.answered.set()
        if self.failing:
            raise ShardLost(peer="p", layers="0:2", problem="gone")
        times = {"queue_ms": 0.5, "handover_ms": 0.25, "codec_ms": 0.25, "wire_ms": 7.0}
        return [HopReport(peer="p", layers="0:2", steps=1, step_ms=self.asked, **times)]


def test_shards_are_asked_at_most_every_few_seconds_and_an_error_changes_nothing() -> None:
    now = [100.0]

    async def main() -> None:
        shards = Shards()
        times = ShardTimes(shards.report, clock=lambda: now[0])
        assert times.known() == {}

        for failing, seconds in ((False, 0), (False, FRESH_S / 2), (True, FRESH_S / 2)):
            now[0] += seconds
            shards.failing = failing
            times.refresh()
            await asyncio.wait_for(shards.answered.wait(), 5)
            await asyncio.sleep(0)
            assert times.known() == {"p": 2.0}

        assert shards.asked == 2

    run(main)
