from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pals.engine.scheduler import Scheduler, WorkItem
from pals.errors import QueueFull

MAX_ROWS = 3
MAX_BYTES = 160


def make_item(session: str, *, is_decode: bool, number: int = 0, tokens: int = 1) -> WorkItem:
    return WorkItem(
        session=session,
        slot=0,
        position=number,
        inputs=np.zeros(tokens, np.int32),
        sampling=None,
        is_decode=is_decode,
        arrived_s=0.0,
        codec_s=0.0,
    )


def make_scheduler(max_bytes: int = MAX_BYTES) -> Scheduler:
    return Scheduler(max_rows=MAX_ROWS, max_bytes=max_bytes)


def names(step: list[WorkItem]) -> str:
    return " ".join(f"{item.session}{item.position}" for item in step)


def run_all(scheduler: Scheduler) -> list[str]:
    steps: list[str] = []
    while step := scheduler.next_step():
        steps.append(names(step))
    return steps


def test_decode_rows_run_together_and_chunks_alone_in_turn() -> None:
    scheduler = make_scheduler()
    for number in range(2):
        scheduler.add(make_item("p", is_decode=False, number=number))
        scheduler.add(make_item("q", is_decode=False, number=number))
    for number in range(4):
        scheduler.add(make_item("abcd"[number], is_decode=True, number=number))
    assert run_all(scheduler) == ["a0 b1 c2", "p0", "d3", "q0", "p1", "q1"]


def test_first_chunk_does_not_wait_for_the_decode_rows_of_a_busy_shard() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_item("a", is_decode=True))
    assert names(scheduler.next_step()) == "a0"
    scheduler.add(make_item("a", is_decode=True, number=1))
    scheduler.add(make_item("p", is_decode=False))
    assert run_all(scheduler) == ["p0", "a1"]


def test_nothing_waits_in_a_new_scheduler() -> None:
    scheduler = make_scheduler()
    assert scheduler.next_step() == []
    assert len(scheduler) == 0


def test_decode_row_ahead_of_its_prompt_waits_for_it() -> None:
    scheduler = make_scheduler()
    for number in range(2):
        scheduler.add(make_item("a", is_decode=False, number=number))
    scheduler.add(make_item("a", is_decode=True, number=2))
    scheduler.add(make_item("b", is_decode=True))
    assert run_all(scheduler) == ["b0", "a0", "a1", "a2"]


@pytest.mark.parametrize("is_decode", [True, False])
def test_budget_counts_both_queues_and_is_given_back(is_decode: bool) -> None:
    scheduler = make_scheduler(max_bytes=16)
    scheduler.add(make_item("a", is_decode=True, tokens=2))
    scheduler.add(make_item("p", is_decode=False, tokens=2))
    with pytest.raises(QueueFull) as caught:
        scheduler.add(make_item("x", is_decode=is_decode))
    assert caught.value.fields == {"queue": "step", "limit": "16 bytes"}
    assert len(scheduler) == 2
    scheduler.next_step()
    scheduler.add(make_item("x", is_decode=is_decode, tokens=2))


@pytest.mark.parametrize("is_decode", [True, False])
def test_dropped_session_gives_exactly_its_budget_back(is_decode: bool) -> None:
    scheduler = make_scheduler(max_bytes=16)
    for session in ("a", "b", "a"):
        scheduler.add(make_item(session, is_decode=is_decode))
    scheduler.drop("a")
    scheduler.drop("nobody")
    scheduler.add(make_item("c", is_decode=not is_decode, tokens=3))
    with pytest.raises(QueueFull):
        scheduler.add(make_item("d", is_decode=is_decode))
    assert sorted(run_all(scheduler)) == ["b0", "c0"]


SESSIONS = st.sampled_from("abcde")


class EveryRowRunsOnceInOrder(RuleBasedStateMachine):
    """Rows come and sessions end in any order; chunks come before a session's decode rows."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make_scheduler()
        self.waiting: list[WorkItem] = []
        self.in_line: list[WorkItem] = []
        """What waits for a step of its own: chunks, and rows that are behind their prompt."""
        self.decoding: set[str] = set()
        self.count = 0
        self.last = "nothing"

    def add(self, item: WorkItem) -> bool:
        fits = sum(i.inputs.nbytes for i in [*self.waiting, item]) <= MAX_BYTES
        try:
            self.scheduler.add(item)
        except QueueFull:
            assert not fits
            return False
        assert fits
        if not item.is_decode or any(i.session == item.session for i in self.in_line):
            self.in_line.append(item)
        self.waiting.append(item)
        self.count += 1
        return True

    @rule(session=SESSIONS, tokens=st.integers(1, 12))
    def add_chunk(self, session: str, tokens: int) -> None:
        if session not in self.decoding:
            self.add(make_item(session, is_decode=False, number=self.count, tokens=tokens))

    @rule(session=SESSIONS)
    def add_decode(self, session: str) -> None:
        if self.add(make_item(session, is_decode=True, number=self.count)):
            self.decoding.add(session)

    @rule(session=SESSIONS)
    def drop(self, session: str) -> None:
        self.scheduler.drop(session)
        self.waiting = [item for item in self.waiting if item.session != session]
        self.in_line = [item for item in self.in_line if item.session != session]
        self.decoding.discard(session)

    @rule()
    def step(self) -> None:
        alone_waited = bool(self.in_line)
        together_waited = len(self.waiting) > len(self.in_line)
        step = self.scheduler.next_step()
        assert bool(step) == bool(self.waiting)
        kind = self.run(step)
        # Whoever waits is passed over for one step at most.
        assert not (kind == self.last == "alone" and together_waited)
        assert not (kind == self.last == "together" and alone_waited)
        self.last = kind

    def run(self, step: list[WorkItem]) -> str:
        """Check what a step holds and take it off the model; return its kind."""
        if not step:
            return "nothing"
        alone = any(item is step[0] for item in self.in_line)
        assert len(step) == 1 if alone else 1 <= len(step) <= MAX_ROWS
        assert alone or all(item.is_decode for item in step)
        for item in step:
            first = next(i for i in self.waiting if i.session == item.session)
            assert first is item
            self.waiting = [i for i in self.waiting if i is not item]
            self.in_line = [i for i in self.in_line if i is not item]
        return "alone" if alone else "together"

    @invariant()
    def length_is_what_waits(self) -> None:
        assert len(self.scheduler) == len(self.waiting)

    def teardown(self) -> None:
        for _ in range(len(self.waiting)):
            self.run(self.scheduler.next_step())
        assert self.waiting == []
        # All of the budget is back.
        self.scheduler.add(make_item("a", is_decode=False, tokens=MAX_BYTES // 4))


TestRows = EveryRowRunsOnceInOrder.TestCase
TestRows.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
