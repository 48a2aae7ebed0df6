from __future__ import annotations

import random

import pytest

from benchmarks.link_emulator import RETRANSMISSION_S, SEGMENT_BYTES, Conditions, Pacer


def make_pacer() -> Pacer:
    return Pacer(random.Random(7))


def test_bytes_arrive_after_their_way_through_the_bottleneck_and_the_delay() -> None:
    conditions = Conditions(delay_s=0.05, bytes_per_s=1000.0)
    pacer = make_pacer()
    arrivals = [pacer.due_s(conditions, 100, now_s) for now_s in (10.0, 10.0, 20.0)]
    assert arrivals == pytest.approx([10.15, 10.25, 20.15])


def test_perfect_conditions_take_no_time() -> None:
    assert make_pacer().due_s(Conditions(), 1 << 20, 3.0) == 3.0


def test_jitter_never_changes_the_order() -> None:
    conditions = Conditions(delay_s=0.02, jitter_s=0.01)
    pacer = make_pacer()
    arrivals = [pacer.due_s(conditions, 1, i / 1000) for i in range(200)]
    delays = {round(arrival - i / 1000, 4) for i, arrival in enumerate(arrivals)}
    assert arrivals == sorted(arrivals)
    assert len(delays) > 20


def test_a_lost_segment_stalls_itself_and_all_bytes_behind_it() -> None:
    pacer = make_pacer()
    lost = pacer.due_s(Conditions(loss=1.0), SEGMENT_BYTES, 1.0)
    behind = pacer.due_s(Conditions(), SEGMENT_BYTES, 1.0)
    assert lost == behind == pytest.approx(1.0 + RETRANSMISSION_S)


def test_more_segments_are_lost_more_often() -> None:
    conditions = Conditions(loss=0.01)

    def count_stalls(size: int) -> int:
        pacer = make_pacer()
        dues = [pacer.due_s(conditions, size, float(i)) - i for i in range(500)]
        return sum(due > 0 for due in dues)

    assert 0 < count_stalls(1) < 20
    assert 250 < count_stalls(100 * SEGMENT_BYTES) < 400
