from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import trio

from pals.engine.worker import StepResult
from pals.net.handback import StepResults

pytestmark = pytest.mark.trio

COUNT = 20_000
"""More than the wakes that a socket holds unread."""


def make_result(number: int) -> StepResult:
    return StepResult(
        items=[], outputs=np.array([number]), free_s=0.0, started_s=0.0, finished_s=0.0
    )


@pytest.fixture
def results() -> Iterator[StepResults]:
    made = StepResults()
    yield made
    made.close()


async def test_results_of_another_thread_come_in_order_and_none_is_left(
    results: StepResults,
) -> None:
    taken: list[int] = []
    done = trio.Event()

    def take(result: StepResult) -> None:
        taken.append(int(result.outputs[0]))
        if len(taken) == COUNT:
            done.set()

    def deliver_all() -> None:
        for number in range(COUNT):
            results.deliver(make_result(number))

    thread = threading.Thread(target=deliver_all)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(results.run, take)
            thread.start()
            await done.wait()
            nursery.cancel_scope.cancel()
    thread.join()
    assert taken == list(range(COUNT))


async def test_results_that_wait_before_anybody_takes_them_all_come(results: StepResults) -> None:
    for number in range(COUNT):
        results.deliver(make_result(number))
    taken: list[int] = []
    with trio.move_on_after(0.2):
        await results.run(lambda result: taken.append(int(result.outputs[0])))
    assert taken == list(range(COUNT))


async def test_a_result_that_comes_after_the_end_goes_nowhere(results: StepResults) -> None:
    results.close()
    results.deliver(make_result(1))
