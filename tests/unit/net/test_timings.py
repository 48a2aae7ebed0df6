from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pals.engine.batch import RowKind
from pals.engine.work import InputRow, StepResult
from pals.net.timings import StepTimings
from pals.types import SessionId
from tests.unit.net.shard_fakes import make_result

SESSION = SessionId(b"s" * 16)


def make_step(*kinds: RowKind, free_s: float = 0.0) -> StepResult:
    """A step of rows that arrived at 10.0 s, were open at 10.1 s and ran until 11.0 s."""
    rows = [
        InputRow(
            owner=number,
            session=SESSION,
            kind=kind,
            position=0,
            inputs=np.zeros(1, np.int32),
            arrived_s=10.0,
            codec_s=0.1,
        )
        for number, kind in enumerate(kinds)
    ]
    result = make_result(rows, ids=[7] * len(rows))
    return replace(result, free_s=free_s, started_s=10.5, finished_s=11.0)


@pytest.mark.parametrize(
    ("free_s", "queue_ms", "handover_ms"),
    [
        pytest.param(9.0, 0.0, 600.0, id="the thread waited for the row"),
        pytest.param(10.4, 300.0, 300.0, id="the row waited for the thread"),
    ],
)
def test_waiting_for_another_step_is_queue_and_the_rest_is_handover(
    free_s: float, queue_ms: float, handover_ms: float
) -> None:
    timings = StepTimings()
    timings.note_step(make_step("decode", free_s=free_s), returned_s=11.2)
    stats = timings.to_stats(seal_s=[0.05])
    assert stats.steps == 1
    assert stats.step_ms == pytest.approx(500.0)
    assert stats.queue_ms == pytest.approx(queue_ms)
    assert stats.handover_ms == pytest.approx(handover_ms)
    assert stats.codec_ms == pytest.approx(150.0)


def test_chunks_of_prompts_count_for_nothing() -> None:
    timings = StepTimings()
    timings.note_step(make_step("prefill"), returned_s=11.2)
    assert timings.to_stats(seal_s=()).steps == 0
    timings.note_step(make_step("decode", "verify", "prefill", free_s=9.0), returned_s=11.2)
    stats = timings.to_stats(seal_s=())
    assert (stats.steps, stats.queue_ms) == (1, 0.0)


def test_a_turn_is_from_one_row_of_a_session_to_its_next_without_pauses() -> None:
    timings = StepTimings()
    for arrived_s in (1.0, 1.2):
        timings.note_arrival(SESSION, arrived_s)
    timings.note_pause(SESSION)
    timings.note_arrival(SESSION, 60.0)
    assert timings.to_stats(seal_s=()).turn_ms == pytest.approx(200.0)


def test_a_shard_without_steps_has_no_times() -> None:
    stats = StepTimings().to_stats(seal_s=())
    assert (stats.steps, stats.step_ms, stats.turn_ms) == (0, 0.0, 0.0)
