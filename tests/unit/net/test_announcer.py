"""When a shard announces, what it says, and that the wall clock does not stop it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import trio
import trio.testing

from pals.errors import InvalidRecord
from pals.net.announce import Announcement, open_announcement
from pals.net.announcer import (
    ANNOUNCE_INTERVAL_S,
    ANNOUNCE_SOON_TIMES,
    LOOK_INTERVAL_S,
    MIN_INTERVAL_S,
    Announcer,
    Sequence,
)
from pals.swarm.identity import Identity
from pals.types import PeerId
from tests.announcements import make_announcement

NOW = 1_900_000_000.0
IDENTITY = Identity.from_seed(bytes(32))


def test_records_are_numbered_by_the_time_in_milliseconds() -> None:
    sequence = Sequence()
    assert [sequence.next(NOW), sequence.next(NOW + 60)] == [1_900_000_000_000, 1_900_000_060_000]


def test_a_clock_that_steps_back_or_stands_still_numbers_upwards() -> None:
    sequence = Sequence()
    numbers = [sequence.next(now) for now in (NOW, NOW, NOW - 3600, NOW - 3600)]
    assert numbers == [numbers[0] + i for i in range(4)]


def test_numbers_start_above_those_of_the_process_before() -> None:
    newest = int(NOW * 1000) + 5000
    assert Sequence(newest).next(NOW) == newest + 1


class FakeDiscovery:
    """Keeps what is announced, with the time at which it was."""

    def __init__(self) -> None:
        self.said: list[tuple[float, Announcement]] = []
        self.refuses = False
        self.seen_seq = -1
        self.doubt: Callable[[], None] = lambda: None

    def on_doubt(self, callback: Callable[[], None]) -> None:
        self.doubt = callback

    def last_seq(self, peer: PeerId) -> int:
        assert peer == IDENTITY.peer_id
        return self.seen_seq

    async def announce(self, record: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if self.refuses:
            raise InvalidRecord(kind="announcement", problem="the list expired")
        opened = open_announcement(record, now_unix=time.time(), is_member=lambda _: True)
        self.said.append((trio.current_time(), opened))


class Bench:
    """An announcer on a clock that jumps, and the shard that it tells about."""

    def __init__(self) -> None:
        self.discovery = FakeDiscovery()
        self.shard = make_announcement(IDENTITY.peer_id)
        self.announcer = Announcer(self.discovery, IDENTITY, lambda: self.shard)
        self.ready = trio.Event()

    async def settle(self, nursery: trio.Nursery) -> None:
        """Run until it announces only once an interval."""
        nursery.start_soon(self.announcer.run, self.ready.set)
        await self.ready.wait()
        await trio.sleep(ANNOUNCE_INTERVAL_S)
        self.discovery.said.clear()


@pytest.mark.trio
async def test_it_is_announced_often_at_first_and_then_steadily(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    bench = Bench()
    nursery.start_soon(bench.announcer.run, bench.ready.set)
    await trio.sleep(3.5 * ANNOUNCE_INTERVAL_S)
    times = [at for at, _ in bench.discovery.said]
    soon = [at for at in times if at < times[0] + ANNOUNCE_INTERVAL_S / 2]
    assert len(soon) == ANNOUNCE_SOON_TIMES
    assert len(times) == ANNOUNCE_SOON_TIMES + 3
    assert [a.seq for _, a in bench.discovery.said] == sorted(
        {a.seq for _, a in bench.discovery.said}
    )


@pytest.mark.trio
async def test_a_shard_that_is_full_or_has_room_again_says_so_soon(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    bench = Bench()
    await bench.settle(nursery)
    for free in (0, 4096):
        bench.shard = replace(bench.shard, free_tokens=free)
        await trio.sleep(LOOK_INTERVAL_S + MIN_INTERVAL_S + 0.1)
    assert [a.free_tokens for _, a in bench.discovery.said] == [0, 4096]


@pytest.mark.trio
async def test_some_tokens_more_or_less_are_no_news(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    bench = Bench()
    await bench.settle(nursery)
    bench.shard = replace(bench.shard, free_tokens=bench.shard.free_tokens // 3)
    await trio.sleep(5 * LOOK_INTERVAL_S)
    assert bench.discovery.said == []


@pytest.mark.trio
async def test_it_answers_doubt_at_once_and_not_more_often_than_is_allowed(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    bench = Bench()
    await bench.settle(nursery)
    doubted_at = trio.current_time()
    for _ in range(100):
        bench.discovery.doubt()
        await trio.sleep(0.01)
    times = [at - doubted_at for at, _ in bench.discovery.said]
    assert times[0] < 0.01
    assert 2 <= len(times) <= 1 + 1.0 / MIN_INTERVAL_S


@pytest.mark.trio
async def test_a_drain_is_announced_at_once_and_stays_announced(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    bench = Bench()
    await bench.settle(nursery)
    bench.announcer.drain()
    await trio.sleep(0.01)
    assert [a.state for _, a in bench.discovery.said] == ["draining"]
    await trio.sleep(ANNOUNCE_INTERVAL_S + LOOK_INTERVAL_S)
    assert {a.state for _, a in bench.discovery.said} == {"draining"}


@pytest.mark.trio
async def test_whoever_leaves_says_so_in_its_newest_record(
    autojump_clock: trio.testing.MockClock,
) -> None:
    bench = Bench()
    bench.discovery.seen_seq = 1 << 50
    await bench.announcer.withdraw()
    [(_, last)] = bench.discovery.said
    assert (last.state, last.seq) == ("leaving", (1 << 50) + 1)


@pytest.mark.trio
async def test_a_refused_record_is_tried_again_and_is_not_told_as_ready(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    bench = Bench()
    bench.discovery.refuses = True
    nursery.start_soon(bench.announcer.run, bench.ready.set)
    await trio.sleep(10)
    assert not bench.ready.is_set()
    bench.discovery.refuses = False
    with trio.fail_after(5):
        await bench.ready.wait()
