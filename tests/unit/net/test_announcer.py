"""What a shard announces, and that the wall clock does not stop it."""

from __future__ import annotations

from pals.net.announcer import Sequence

NOW = 1_900_000_000.0


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
