from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pals.engine.batch import (
    Admitted,
    BatchRules,
    Ended,
    Event,
    Refused,
    RowKind,
    SessionRequest,
)
from pals.engine.compute import ComputeThread
from pals.engine.work import Delivery, InputRow, PenaltyHistory, StepResult
from pals.errors import (
    AdmissionTimeout,
    InternalStepError,
    InvalidStep,
    PeerSessionsFull,
    QueueFull,
    ShardBusy,
)
from pals.types import PeerId, Sampling, SessionId
from tests.unit.engine.page_memory import next_token
from tests.unit.engine.page_runner import LARGEST_ID, PENALISED, WAIT_S, PageRunner
from tests.unit.engine.virtual_batch import make_batcher

ALICE = PeerId("12D3alice")
NUM_PAGES = 40
PROMPT = [1, 2, 3]
RULES = BatchRules(max_sessions_per_peer=8)


def name(text: str) -> SessionId:
    return SessionId(text.encode().ljust(16, b"-"))


def request(text: str) -> SessionRequest:
    return SessionRequest(session=name(text), peer=ALICE, prompt_tokens=len(PROMPT), max_tokens=200)


def row(
    text: str, kind: RowKind, position: int, tokens: list[int], owner: str | None = None
) -> InputRow:
    return InputRow(
        owner=owner or text,
        session=name(text),
        kind=kind,
        position=position,
        inputs=np.array(tokens, np.int32),
        arrived_s=float(position),
        codec_s=0.5,
    )


class Bench:
    """A compute thread over pages of tokens; deliveries come out of a queue."""

    def __init__(
        self,
        *,
        is_tail: bool = True,
        rules: BatchRules = RULES,
        max_queued_bytes: int = 1 << 20,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        batcher, _ = make_batcher(NUM_PAGES, rules=rules)
        self.runner = PageRunner(NUM_PAGES, is_tail=is_tail)
        self.deliveries: queue.Queue[Delivery] = queue.Queue()
        self.opened: list[str] = []
        self.compute = ComputeThread(
            self.runner,
            batcher,
            self.deliveries.put,
            max_queued_bytes=max_queued_bytes,
            clock=clock,
        )

    def open(self, *texts: str, sampling: Sampling | None = None) -> None:
        """Open sessions whose owners are their names."""
        for text in texts:
            chosen = (sampling or Sampling()) if self.runner.is_tail else None
            self.compute.open(request(text), text, chosen)
            self.opened.append(text)

    def start(self, *texts: str) -> None:
        """Start the thread, admit all sessions, and compute the prompts of some more."""
        self.open(*texts)
        self.compute.start()
        admitted: set[object] = set()
        while not admitted.issuperset(self.opened):
            admitted |= {owner for owner, _ in self.events()}
        for text in texts:
            self.add(row(text, "prefill", 0, PROMPT))
            self.result()

    def add(self, *rows: InputRow) -> None:
        assert self.compute.add(rows) == []

    def next(self) -> Delivery:
        return self.deliveries.get(timeout=WAIT_S)

    def events(self) -> list[tuple[object, Event]]:
        delivery = self.next()
        assert delivery.result is None
        return [tuple(owned) for owned in delivery.events]

    def result(self) -> StepResult:
        """Return the next step, whose sessions go on."""
        delivery = self.next()
        assert delivery.events == ()
        assert delivery.result is not None
        assert delivery.result.error is None
        return delivery.result

    def hold(self, *rows: InputRow) -> None:
        """Let a step of these rows begin, but not end."""
        self.runner.entered.clear()
        self.runner.released.clear()
        self.add(*rows)
        assert self.runner.entered.wait(WAIT_S)

    def release(self) -> None:
        self.runner.released.set()


def tokens_of(result: StepResult) -> list[tuple[object, list[int]]]:
    """Return each row's owner with the tokens that were sampled for it."""
    assert result.output is not None
    assert result.output.sampled is not None
    ids = result.output.sampled.ids.tolist()
    return [(row.owner, ids[row.first : row.first + row.outputs]) for row in result.rows]


@pytest.fixture
def make_bench() -> Iterator[Callable[..., Bench]]:
    with ExitStack() as stack:

        def make(**options: Any) -> Bench:
            bench = Bench(**options)
            stack.callback(bench.compute.close, WAIT_S)
            stack.callback(bench.release)
            return bench

        yield make


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    return make_bench()


# --- steps ---------------------------------------------------------------------------


def test_session_is_admitted_and_its_prompt_sampled_once_all_of_it_has_run(bench: Bench) -> None:
    bench.open("a")
    bench.compute.start()
    assert bench.events() == [("a", Admitted(name("a"), 0))]

    bench.add(row("a", "prefill", 0, PROMPT[:2]))
    first = bench.result()
    bench.add(row("a", "prefill", 2, PROMPT[2:]))
    second = bench.result()

    assert tokens_of(first) == [("a", [])]
    assert tokens_of(second) == [("a", [next_token(PROMPT)])]
    assert [(r.kind, r.position, r.tokens) for r in second.rows] == [("prefill", 2, 1)]


def test_decode_rows_that_wait_run_in_one_step_with_their_samplings(bench: Bench) -> None:
    bench.open("b", sampling=Sampling(seed=7))
    bench.start("a")
    bench.add(row("b", "prefill", 0, PROMPT))
    bench.result()
    bench.hold(row("a", "decode", 3, [4]))
    bench.add(row("b", "decode", 3, [5]), row("a", "decode", 4, [6]))
    bench.release()
    bench.result()

    result = bench.result()

    history = [*PROMPT, 5]
    assert sorted(tokens_of(result)) == [
        ("a", [next_token([*PROMPT, 4, 6])]),
        ("b", [next_token(history, 7)]),
    ]
    assert {r.session: (r.arrived_s, r.codec_s) for r in result.rows} == {
        name("a"): (4.0, 0.5),
        name("b"): (3.0, 0.5),
    }
    assert result.free_s <= result.started_s <= result.finished_s


def test_draft_has_a_token_for_each_of_its_own_and_steps_back(bench: Bench) -> None:
    bench.start("a")
    bench.add(row("a", "verify", 3, [4, 5, 6]))
    drafted = bench.result()
    bench.add(row("a", "decode", 4, [9]))
    corrected = bench.result()

    histories = [[*PROMPT, *[4, 5, 6][:n]] for n in (1, 2, 3)]
    assert tokens_of(drafted) == [("a", [next_token(history) for history in histories])]
    assert tokens_of(corrected) == [("a", [next_token([*PROMPT, 4, 9])])]


def test_shard_that_is_not_the_tail_gives_hidden_states_of_all_tokens(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(is_tail=False)
    bench.start("a")
    bench.add(row("a", "verify", 3, [4, 5]))
    result = bench.result()

    assert [(r.first, r.outputs) for r in result.rows] == [(0, 2)]
    assert result.output is not None
    assert result.output.sampled is None
    assert result.output.hidden is not None
    assert result.output.hidden.tolist() == [
        [next_token([*PROMPT, 4])],
        [next_token([*PROMPT, 4, 5])],
    ]


def test_fork_may_send_its_first_row_before_it_is_admitted(bench: Bench) -> None:
    bench.start("a")
    bench.hold(row("a", "decode", 3, [4]))
    bench.compute.fork(name("a"), name("f"), 3, "fork", Sampling(seed=5))
    bench.add(row("f", "decode", 3, [8], owner="fork"))
    bench.release()
    bench.result()

    assert bench.events() == [("fork", Admitted(name("f"), 3))]
    assert tokens_of(bench.result()) == [("fork", [next_token([*PROMPT, 8], 5)])]


def test_all_calls_of_the_shard_are_on_the_one_thread(bench: Bench) -> None:
    bench.start("a", "b")
    bench.compute.close_session(name("a"))
    bench.add(row("b", "decode", 3, [4]))
    bench.result()

    assert bench.runner.calls == ["open", "open", "run", "run", "close", "run"]
    assert bench.runner.threads == {"pals-compute"}


# --- what does not fit ---------------------------------------------------------------


def test_row_that_no_step_can_compute_is_refused_alone(bench: Bench) -> None:
    bench.start("a", "b")
    bad = row("a", "decode", 3, [LARGEST_ID + 1])
    refused = bench.compute.add([bad, row("b", "decode", 3, [4])])

    assert [(one.row, type(one.error)) for one in refused] == [(bad, InvalidStep)]
    assert [owner for owner, _ in tokens_of(bench.result())] == ["b"]


def test_row_that_leaves_a_gap_is_refused_alone(bench: Bench) -> None:
    bench.start("a", "b")
    gap = row("a", "decode", 4, [4])
    refused = bench.compute.add([gap, row("b", "decode", 3, [4])])

    assert [(one.row, type(one.error)) for one in refused] == [(gap, InvalidStep)]
    assert [owner for owner, _ in tokens_of(bench.result())] == ["b"]


def test_row_before_its_session_is_admitted_is_refused(bench: Bench) -> None:
    bench.open("a")
    [refused] = bench.compute.add([row("a", "prefill", 0, PROMPT)])
    assert isinstance(refused.error, InvalidStep)


def test_more_bytes_than_may_wait_are_refused_until_others_have_run(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(max_queued_bytes=12)
    bench.start("a", "b")
    bench.hold(row("a", "decode", 3, [4]))
    bench.add(row("a", "decode", 4, [5]), row("a", "decode", 5, [6]), row("a", "decode", 6, [7]))
    [refused] = bench.compute.add([row("b", "decode", 3, [4])])
    bench.release()
    for _ in range(4):
        bench.result()
    bench.add(row("b", "decode", 3, [4]))

    assert isinstance(refused.error, QueueFull)
    assert [owner for owner, _ in tokens_of(bench.result())] == ["b"]


def test_session_that_may_not_be_opened_leaves_nothing_behind(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(rules=replace(RULES, max_sessions_per_peer=1))
    bench.open("a")
    with pytest.raises(PeerSessionsFull):
        bench.open("b")
    with pytest.raises(InvalidStep):
        bench.compute.open(request("a"), "other", Sampling())
    bench.compute.start()

    assert bench.events() == [("a", Admitted(name("a"), 0))]


def test_thread_wakes_by_itself_for_those_who_waited_too_long(
    make_bench: Callable[..., Bench],
) -> None:
    now_s = 0.0
    rules = replace(RULES, max_sessions=1, admission_wait_s=0.01)
    bench = make_bench(rules=rules, clock=lambda: now_s)
    bench.start("a")
    bench.open("b")
    now_s = 0.02

    [(owner, event)] = bench.events()

    assert owner == "b"
    assert isinstance(event, Refused)
    assert isinstance(event.error, AdmissionTimeout)


# --- the sampler's room --------------------------------------------------------------


def test_session_that_the_sampler_has_no_room_for_is_refused(bench: Bench) -> None:
    bench.open("a", "b", "c", sampling=PENALISED)
    bench.compute.start()
    events = dict(bench.events())

    assert isinstance(events["c"], Refused)
    assert isinstance(events["c"].error, ShardBusy)
    assert {owner for owner, event in events.items() if isinstance(event, Admitted)} == {"a", "b"}
    assert bench.compute.num_running == 2


def test_fork_that_the_sampler_has_no_room_for_is_refused_and_its_rows_do_not_run(
    bench: Bench,
) -> None:
    bench.open("x", "y", sampling=PENALISED)
    bench.start("a")
    bench.hold(row("a", "decode", 3, [4]))
    bench.compute.fork(name("a"), name("f"), 3, "fork", PENALISED)
    bench.add(row("f", "decode", 3, [8], owner="fork"))
    bench.release()
    bench.result()

    [(owner, event)] = bench.events()

    assert owner == "fork"
    assert isinstance(event, Refused)
    bench.add(row("a", "decode", 4, [5]))
    assert [owner for owner, _ in tokens_of(bench.result())] == ["a"]


def test_what_a_row_may_sample_is_set_before_the_step_that_samples_it(bench: Bench) -> None:
    masked = PenaltyHistory(np.zeros(0, np.int32), 0, is_masked=True)
    bench.compute.open(request("a"), "a", Sampling(), masked)
    bench.start("b")
    prompt = replace(row("a", "prefill", 0, PROMPT), allowed=np.array([5], np.uint32))
    bench.add(prompt)
    bench.result()
    bench.add(row("b", "decode", 3, [4]))
    bench.result()
    bench.add(replace(row("a", "decode", 3, [4]), allowed=np.array([6], np.uint32)))
    bench.result()

    calls = [call for call in bench.runner.calls if call.startswith(("allow", "run"))]
    assert calls == ["run", "allow [5]", "run", "run", "allow [6]", "run"]


def test_room_of_a_closed_session_is_free_once_its_step_has_run(bench: Bench) -> None:
    bench.open("a", sampling=PENALISED)
    bench.compute.start()
    bench.events()
    bench.hold(row("a", "prefill", 0, PROMPT))
    bench.compute.close_session(name("a"))
    slots_meanwhile = len(bench.runner.free_slots)
    bench.release()
    bench.result()
    bench.open("b")
    bench.events()

    assert slots_meanwhile == 1
    assert len(bench.runner.free_slots) == 2
    assert bench.runner.calls == ["open", "run", "close", "open"]


def test_session_closed_while_its_room_is_made_leaves_none_behind(bench: Bench) -> None:
    bench.open("a", sampling=PENALISED)
    bench.runner.on_open = lambda: bench.compute.close_session(name("a"))
    bench.compute.start()
    bench.open("b")

    assert bench.events() == [("b", Admitted(name("b"), 0))]
    assert sorted(bench.runner.calls) == ["close", "open", "open"]
    assert len(bench.runner.free_slots) == 2


def test_sampler_that_fails_ends_only_the_session_it_was_asked_for(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.start("a")
    bench.runner.open_failure = RuntimeError("boom")
    bench.open("b")
    [(owner, event)] = bench.events()

    assert owner == "b"
    assert isinstance(event, Refused)
    assert isinstance(event.error, InternalStepError)
    assert "boom" in caplog.text
    bench.add(row("a", "decode", 3, [4]))
    bench.result()


# --- sessions that end while a step runs ---------------------------------------------


def test_row_of_a_session_that_was_closed_meanwhile_is_delivered_to_its_owner(
    bench: Bench,
) -> None:
    bench.start("a")
    bench.hold(row("a", "decode", 3, [4]))
    bench.compute.close_session(name("a"))
    bench.compute.open(request("a"), "second", Sampling())
    bench.release()

    assert tokens_of(bench.result()) == [("a", [next_token([*PROMPT, 4])])]
    assert bench.events() == [("second", Admitted(name("a"), 0))]


def test_late_row_of_an_owner_before_goes_nowhere(bench: Bench) -> None:
    bench.start("a")
    bench.compute.close_session(name("a"))
    bench.add(row("a", "decode", 3, [4]))
    bench.compute.open(request("a"), "second", Sampling())
    bench.events()
    bench.add(row("a", "prefill", 0, [9, 9, 9]), row("a", "prefill", 0, PROMPT, owner="second"))

    assert tokens_of(bench.result()) == [("second", [next_token(PROMPT)])]


def test_fork_may_have_the_id_of_a_session_that_was_closed_while_its_step_runs(
    bench: Bench,
) -> None:
    bench.start("a", "b")
    bench.hold(row("b", "decode", 3, [4]))
    bench.compute.close_session(name("b"))
    bench.compute.fork(name("a"), name("b"), 3, "fork", Sampling())
    bench.release()

    assert [owner for owner, _ in tokens_of(bench.result())] == ["b"]
    assert bench.events() == [("fork", Admitted(name("b"), 3))]


# --- failures ------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [InvalidStep(problem="x"), RuntimeError("boom")])
def test_failed_step_ends_every_session_and_the_next_one_begins_anew(
    bench: Bench, failure: Exception
) -> None:
    bench.start("a", "b")
    bench.runner.failure = failure
    bench.add(row("a", "decode", 3, [4]))
    delivery = bench.next()
    bench.runner.failure = None
    bench.open("c")
    bench.events()
    bench.add(row("c", "prefill", 0, PROMPT))

    assert delivery.result is not None
    assert (delivery.result.error, delivery.result.output) == (failure, None)
    assert [owned.owner for owned in delivery.events] == ["a", "b"]
    for _, event in delivery.events:
        assert isinstance(event, Ended)
        assert isinstance(event.error, InvalidStep | InternalStepError)
        assert "boom" not in str(event.error)
    assert bench.runner.calls.count("reset") == 1
    assert tokens_of(bench.result()) == [("c", [next_token(PROMPT)])]


def test_only_an_unexpected_failure_is_logged(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.compute.start()
    for text, failure in (("a", InvalidStep(problem="x")), ("b", RuntimeError("boom"))):
        bench.open(text)
        bench.events()
        bench.runner.failure = failure
        bench.add(row(text, "prefill", 0, PROMPT))
        bench.next()

    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "boom" in caplog.text


def test_session_that_waits_outlives_a_failed_step_and_gets_new_room_in_the_bank(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(rules=replace(RULES, max_sessions=1))
    history = PenaltyHistory(np.array(PROMPT, np.int32), 0)
    bench.start("a")
    bench.compute.open(request("b"), "b", PENALISED, history)
    bench.runner.failure = RuntimeError("boom")
    bench.add(row("a", "decode", 3, [4]))
    bench.next()
    bench.runner.failure = None

    assert bench.events() == [("b", Admitted(name("b"), 0))]
    opened = "open [1, 2, 3]"
    calls = bench.runner.calls
    assert calls[calls.index("reset") :].count(opened) == 1
    assert len(bench.runner.free_slots) == 1


def test_thread_goes_on_although_the_cache_could_not_be_made_anew(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.start("a")
    bench.runner.failure = bench.runner.reset_failure = RuntimeError("no memory")
    bench.add(row("a", "decode", 3, [4]))
    assert [owned.owner for owned in bench.next().events] == ["a"]
    bench.open("b")

    assert bench.events() == [("b", Admitted(name("b"), 0))]
    assert "could not be made anew" in caplog.text


# --- the thread ----------------------------------------------------------------------


def test_close_ends_the_step_that_runs_and_starts_no_other(bench: Bench) -> None:
    bench.start("a")
    bench.hold(row("a", "decode", 3, [4]))
    bench.add(row("a", "decode", 4, [5]))
    bench.compute.close(timeout_s=0.0)
    bench.release()
    bench.compute.close(WAIT_S)

    assert bench.runner.calls.count("run") == 2
    assert bench.deliveries.qsize() == 1


def test_close_ends_a_thread_that_waits() -> None:
    before = set(threading.enumerate())
    bench = Bench()
    bench.compute.start()
    assert len(set(threading.enumerate()) - before) == 1
    bench.compute.close(WAIT_S)
    assert set(threading.enumerate()) <= before


def test_close_of_a_thread_that_was_never_started_returns() -> None:
    Bench().compute.close(WAIT_S)


def test_room_is_announced_as_the_batcher_counts_it(bench: Bench) -> None:
    bench.start()
    empty = bench.compute.free_tokens
    bench.open("a")
    bench.events()

    assert empty == NUM_PAGES * 16
    assert bench.compute.free_tokens == (NUM_PAGES - 1) * 16
