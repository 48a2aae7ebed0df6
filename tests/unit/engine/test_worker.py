from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from pals.engine.scheduler import WorkItem
from pals.engine.worker import ComputeThread, StepResult
from pals.errors import InvalidStep, QueueFull
from pals.types import EngineLimits, Sampling

WAIT_S = 10.0
LIMITS = EngineLimits(max_sessions=4, max_context_tokens=32, max_chunk_tokens=16)
HOT = Sampling(temperature=1.0, seed=3)
Array = npt.NDArray[np.generic]


class FakeShard:
    """Adds one to each input; refuses what a real shard refuses; may be held up."""

    limits = LIMITS

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.threads: set[str] = set()
        self.entered = threading.Event()
        self.released = threading.Event()
        self.released.set()
        self.failure: Exception | None = None

    def prefill(
        self, *, slot: int, position: int, inputs: Array, sampling: Sampling | None
    ) -> Array:
        self._note("prefill", slot, position, inputs.tolist(), sampling)
        return inputs + 1

    def decode(
        self, *, slots: list[int], positions: list[int], inputs: Array, samplings: list[Sampling]
    ) -> Array:
        self._note("decode", slots, positions, inputs.tolist(), samplings)
        if 99 in inputs.tolist() or len(set(slots)) < len(slots):
            raise InvalidStep(problem="refused")
        return inputs + 1

    def _note(self, *call: object) -> None:
        self.calls.append(call)
        self.threads.add(threading.current_thread().name)
        self.entered.set()
        assert self.released.wait(WAIT_S)
        if self.failure is not None:
            raise self.failure


class Bench:
    """A compute thread on a fake shard; results come out of a queue."""

    def __init__(self, max_queued_bytes: int = 1 << 20) -> None:
        self.shard = FakeShard()
        self.results: queue.Queue[StepResult] = queue.Queue()
        self.compute = ComputeThread(
            self.shard, self.results.put, max_queued_bytes=max_queued_bytes
        )

    def next(self) -> StepResult:
        return self.results.get(timeout=WAIT_S)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.shard.released.set()
    made.compute.close(WAIT_S)


def make_item(
    slot: int, value: int = 1, *, is_decode: bool = True, sampling: Sampling | None = None
) -> WorkItem:
    return WorkItem(
        session=f"session-{slot}",
        slot=slot,
        position=10 + slot,
        inputs=np.array([value], np.int32),
        sampling=sampling,
        is_decode=is_decode,
        arrived_s=0.0,
        codec_s=0.0,
    )


def outputs(result: StepResult) -> list[int]:
    return result.outputs.tolist()


def test_decode_rows_that_wait_run_as_one_batch(bench: Bench) -> None:
    items = [make_item(0, 5), make_item(2, 6, sampling=HOT), make_item(1, 7)]
    bench.compute.submit(items)
    bench.compute.start()
    result = bench.next()
    assert bench.shard.calls == [
        ("decode", [0, 2, 1], [10, 12, 11], [5, 6, 7], [Sampling(), HOT, Sampling()])
    ]
    assert result.items == items
    assert outputs(result) == [6, 7, 8]
    assert result.error is None
    assert result.free_s <= result.started_s <= result.finished_s


def test_chunk_runs_with_its_own_sampling(bench: Bench) -> None:
    bench.compute.start()
    bench.compute.submit([make_item(1, 5, is_decode=False, sampling=HOT)])
    assert outputs(bench.next()) == [6]
    bench.compute.submit([make_item(2, 5, is_decode=False)])
    bench.next()
    assert bench.shard.calls == [
        ("prefill", 1, 11, [5], HOT),
        ("prefill", 2, 12, [5], None),
    ]


def test_all_steps_run_on_the_one_thread(bench: Bench) -> None:
    bench.compute.start()
    for slot in range(3):
        bench.compute.submit([make_item(slot, is_decode=slot % 2 == 0)])
        bench.next()
    assert bench.shard.threads == {"pals-compute"}


@pytest.mark.parametrize("failure", [InvalidStep(problem="x"), RuntimeError("boom")])
def test_failed_step_is_delivered_and_the_next_one_runs(bench: Bench, failure: Exception) -> None:
    bench.shard.failure = failure
    bench.compute.start()
    item = make_item(0)
    bench.compute.submit([item])
    result = bench.next()
    assert (result.items, outputs(result), result.error) == ([item], [], failure)
    assert len(bench.shard.calls) == 1
    bench.shard.failure = None
    bench.compute.submit([make_item(1, 5)])
    assert outputs(bench.next()) == [6]


def test_only_an_unexpected_failure_is_logged(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.compute.start()
    for failure in (InvalidStep(problem="x"), RuntimeError("boom")):
        bench.shard.failure = failure
        bench.compute.submit([make_item(0)])
        bench.next()
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "boom" in caplog.text


def test_refused_row_fails_alone_and_the_rest_of_its_batch_runs(bench: Bench) -> None:
    bench.compute.submit([make_item(0, 5), make_item(1, 99), make_item(2, 7)])
    bench.compute.start()
    results = [bench.next() for _ in range(3)]
    assert [result.items[0].slot for result in results] == [0, 1, 2]
    assert [outputs(result) for result in results] == [[6], [], [8]]
    assert [type(result.error) for result in results] == [type(None), InvalidStep, type(None)]


def test_second_row_of_a_session_in_one_batch_harms_nobody(bench: Bench) -> None:
    bench.compute.submit([make_item(0, 5), make_item(0, 6), make_item(1, 7)])
    bench.compute.start()
    assert [outputs(bench.next()) for _ in range(3)] == [[6], [7], [8]]


def test_batch_that_failed_unexpectedly_is_not_run_again(bench: Bench) -> None:
    bench.shard.failure = RuntimeError("boom")
    bench.compute.submit([make_item(0), make_item(1)])
    bench.compute.start()
    assert len(bench.next().items) == 2
    bench.compute.close(WAIT_S)
    assert len(bench.shard.calls) == 1


def test_rows_before_the_one_that_does_not_fit_run() -> None:
    small = Bench(max_queued_bytes=4)
    small.compute.start()
    with pytest.raises(QueueFull):
        small.compute.submit([make_item(0, 5), make_item(1, 6)])
    assert outputs(small.next()) == [6]
    small.compute.close(WAIT_S)


def test_dropped_rows_do_not_run_but_the_running_step_ends(bench: Bench) -> None:
    bench.shard.released.clear()
    bench.compute.start()
    bench.compute.submit([make_item(0, 5)])
    assert bench.shard.entered.wait(WAIT_S)
    bench.compute.submit([make_item(0, 6), make_item(1, 7)])
    bench.compute.drop("session-0")
    bench.shard.released.set()
    assert [outputs(bench.next()) for _ in range(2)] == [[6], [8]]


def test_dropped_row_of_a_refused_batch_is_not_run_again(bench: Bench) -> None:
    """Its slot may be another session's by then."""
    bench.shard.released.clear()
    bench.compute.submit([make_item(0, 5), make_item(1, 99), make_item(2, 7)])
    bench.compute.start()
    assert bench.shard.entered.wait(WAIT_S)
    bench.compute.drop("session-0")
    bench.shard.released.set()
    assert [bench.next().items[0].slot for _ in range(2)] == [1, 2]
    assert [call[1] for call in bench.shard.calls] == [[0, 1, 2], [1], [2]]


def test_session_that_was_dropped_before_may_come_again(bench: Bench) -> None:
    bench.compute.drop("session-0")
    bench.compute.submit([make_item(0, 5)])
    bench.compute.start()
    assert outputs(bench.next()) == [6]


def test_close_ends_the_step_that_runs_and_starts_no_other(bench: Bench) -> None:
    bench.shard.released.clear()
    bench.compute.start()
    bench.compute.submit([make_item(0)])
    assert bench.shard.entered.wait(WAIT_S)
    bench.compute.submit([make_item(1)])
    bench.compute.close(timeout_s=0.0)
    bench.shard.released.set()
    bench.compute.close(WAIT_S)
    assert len(bench.shard.calls) == 1
    assert bench.results.qsize() == 1


def test_close_ends_a_thread_that_waits(bench: Bench) -> None:
    before = set(threading.enumerate())
    bench.compute.start()
    assert len(set(threading.enumerate()) - before) == 1
    bench.compute.close(WAIT_S)
    assert set(threading.enumerate()) <= before
