from __future__ import annotations

import pytest

from pals.engine.gathering import Gathering, Return, find_gap, gap_after_step


def seconds_of(rows: int) -> float:
    """Return what a step takes: its weights, and little for each row; 8 at most."""
    return 0.1 + 0.001 * rows if 1 <= rows <= 8 else 0.0


def away(left_at: float, away_s: float) -> Return:
    return Return(left_at=left_at, away_s=away_s)


def test_return_is_expected_after_what_earlier_ones_took() -> None:
    row = Return()
    row.leave(1.0)
    assert row.within(9.0, 1.0) is None  # none came back yet
    row.come(1.5)
    assert row.within(9.0, 1.5) is None  # it is here
    row.leave(2.0)
    assert row.within(1.0, 2.1) == pytest.approx(0.4)
    row.come(2.9)
    row.leave(3.0)
    assert row.within(1.0, 3.0) == pytest.approx(0.6)  # a quarter of the way from 0.5 to 0.9


def test_return_is_not_expected_long_before_nor_long_after() -> None:
    row = away(1.0, 0.5)
    assert row.within(0.1, 1.3) is None
    assert row.within(0.1, 1.45) == pytest.approx(0.05)
    assert row.within(0.1, 1.52) == 0.0
    assert row.within(0.1, 1.53) is None


def test_first_row_that_comes_unasked_says_nothing() -> None:
    row = Return()
    row.come(1.0)
    assert row.away_s is None


def test_step_waits_for_rows_that_come_at_once_and_only_for_so_long() -> None:
    gathering = Gathering(seconds_of)
    rows = [away(0.99, 0.015), away(0.0, 3.0)]

    until = gathering.wait_until(1, rows, 1.0)
    assert until is not None
    assert 1.005 < until < 1.01

    assert gathering.wait_until(2, [away(1.0, 0.011)], 1.005) is not None  # and for another
    assert gathering.wait_until(2, [away(1.0, 0.014)], 1.0135) is None  # an eighth of 0.1 s is over
    assert gathering.wait_until(2, [away(1.0, 0.014)], 1.0136) is not None  # the next step's wait


def test_step_does_not_wait_for_rows_that_are_far_or_find_no_room() -> None:
    assert Gathering(seconds_of).wait_until(1, [away(1.0, 0.05)], 1.0) is None
    assert Gathering(seconds_of).wait_until(8, [away(1.0, 0.001)], 1.0) is None
    assert Gathering(seconds_of).wait_until(1, [], 1.0) is None


def test_step_does_not_wait_where_every_row_costs_as_much_as_alone() -> None:
    gathering = Gathering(lambda rows: 0.1 * rows)
    assert gathering.wait_until(2, [away(1.0, 0.001)] * 3, 1.0) is None


def test_step_waits_for_the_many_and_not_for_one_straggler() -> None:
    gathering = Gathering(lambda rows: 0.1 if rows <= 3 else 0.105 + 0.1 * (rows - 3))
    until = gathering.wait_until(1, [away(1.0, 0.002)] * 2 + [away(1.0, 0.012)], 1.0)
    assert until is not None
    assert until < 1.008


def test_gap_is_between_the_last_that_left_and_the_first_that_comes() -> None:
    gap = find_gap([away(1.0, 0.5), away(1.25, 1.0)], 1.3)

    assert gap is not None
    assert gap.since_s == pytest.approx(0.05)
    assert gap.left_s == pytest.approx(0.2)
    assert gap.until == pytest.approx(2.0)


def test_late_row_is_expected_until_it_was_away_for_twice_as_long() -> None:
    late = find_gap([away(1.0, 0.5)], 1.9)

    assert late is not None
    assert late.left_s < 0
    assert find_gap([away(1.0, 0.5)], 2.0) is None


def test_no_gap_is_known_where_no_row_came_back_before() -> None:
    assert find_gap([], 1.0) is None
    assert find_gap([Return(), Return(left_at=1.0), Return(away_s=1.0)], 1.0) is None


def test_gap_after_a_step_ends_with_the_first_row_that_comes_again_or_is_away() -> None:
    here = [away(0.0, 0.5), away(0.0, 0.3)]
    assert gap_after_step(here, [], 1.0) == pytest.approx(0.3)
    assert gap_after_step(here, [away(0.9, 0.2)], 1.0) == pytest.approx(0.1)
    assert gap_after_step(here, [away(0.9, 0.08)], 1.0) == 0.0  # it comes during the step


def test_no_gap_is_known_after_a_row_that_came_for_the_first_time() -> None:
    assert gap_after_step([away(0.0, 0.5), Return()], [], 1.0) == 0.0
    assert gap_after_step([], [], 1.0) == 0.0
