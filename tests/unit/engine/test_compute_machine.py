"""The core of the compute thread under random schedules, against lists of tokens."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pals.engine.batch import Admitted, BatchRules, RowKind, SessionRequest
from pals.engine.compute_core import Compute, Planned
from pals.engine.prefix import hash_blocks
from pals.engine.work import InputRow, OwnedEvent, RowResult, StepOutput
from pals.errors import CapacityError, InternalStepError, InvalidStep, QueueFull
from pals.types import LayerRange, PeerId, Sampling, SessionId
from tests.unit.engine.page_memory import next_token
from tests.unit.engine.page_runner import PageRunner, change_samplings
from tests.unit.engine.virtual_batch import LIMITS, SALT, cost, make_batcher

PEERS = [PeerId(f"12D3{name}") for name in ("alice", "bob", "carol")]
PROMPTS = [[n] * 64 + [n + 1] * 40 for n in range(2)]
RULES = BatchRules(max_sessions=6, max_waiting_sessions=3)
NUMBERS = st.integers(0, 9)
MOST_TOKENS = 240
MOST_BYTES = 4 * 300


class Sent(NamedTuple):
    """A token that waits for its step."""

    kind: RowKind
    position: int
    token: int


@dataclass
class SentArray:
    """An array of tokens that came in one row.

    Attributes:
        tokens: Of them, how many have not run.
        size: In bytes, of all of them.
    """

    tokens: int
    size: int


@dataclass(eq=False)
class Modelled:
    """A session as its driver sees it, and its owner.

    Attributes:
        sent: All tokens by position, those that wait included.
        done: Tokens that ran, by position.
        waits: Tokens that wait, in the order in which they have to run.
        arrays: In which they came.
        takes_rows: It is admitted, or a fork.
        is_settled: It is admitted.
    """

    session: SessionId
    peer: PeerId
    prompt: list[int]
    sampling: Sampling | None
    sent: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    waits: deque[Sent] = field(default_factory=deque)
    arrays: deque[SentArray] = field(default_factory=deque)
    takes_rows: bool = False
    is_settled: bool = False
    is_started: bool = False


class ComputeAgainstLists(RuleBasedStateMachine):
    @initialize(num_pages=st.integers(15, 40), is_tail=st.booleans())
    def begin(self, num_pages: int, is_tail: bool) -> None:
        batcher, self.pool = make_batcher(num_pages, rules=RULES)
        self.runner = PageRunner(num_pages, page_tokens=LIMITS.page_tokens, is_tail=is_tail)
        self.core = Compute(batcher, is_tail=is_tail, max_queued_bytes=MOST_BYTES)
        self.now = 0.0
        self.count = 0
        self.live: dict[SessionId, Modelled] = {}
        self.flying: tuple[Planned, list[list[float]], StepOutput] | None = None

    # --- what drivers do -------------------------------------------------------------

    def new_id(self) -> SessionId:
        """Return an id that no session has now; after some time they come again."""
        self.count += 1
        ids = (SessionId(((self.count + n) % 16).to_bytes(16, "big")) for n in range(16))
        return next(session for session in ids if session not in self.live)

    def new_sampling(self, penalised: bool) -> Sampling | None:
        if not self.runner.is_tail:
            return None
        return Sampling(seed=self.count, presence_penalty=1.0 if penalised else 0.0)

    def pick(self, number: int) -> Modelled:
        running = [model for model in self.live.values() if model.takes_rows]
        return running[number % len(running)]

    def has_running(self) -> bool:
        return any(model.takes_rows for model in self.live.values())

    @rule(
        peer=st.sampled_from(PEERS),
        prompt=st.sampled_from(PROMPTS),
        deadline=st.booleans(),
        penalised=st.booleans(),
    )
    def open(self, peer: PeerId, prompt: list[int], deadline: bool, penalised: bool) -> None:
        session = self.new_id()
        request = SessionRequest(
            session=session,
            peer=peer,
            prompt_tokens=len(prompt),
            max_tokens=MOST_TOKENS,
            names=hash_blocks(SALT, prompt),
            deadline=self.now + 5 if deadline else float("inf"),
        )
        model = Modelled(session, peer, prompt, self.new_sampling(penalised))
        try:
            self.core.open(request, model, model.sampling, None, self.now)
        except CapacityError:
            return
        self.live[session] = model

    @precondition(has_running)
    @rule(number=NUMBERS, back=st.integers(0, 30), penalised=st.booleans())
    def fork(self, number: int, back: int, penalised: bool) -> None:
        parent = self.pick(number)
        if not parent.is_settled or any(sent.kind != "prefill" for sent in parent.waits):
            return  # drivers fork only what has come back from the tail, or a prompt
        history = parent.sent[: len(parent.sent) - back]
        sampling = self.new_sampling(penalised)
        child = Modelled(self.new_id(), parent.peer, parent.prompt, sampling)
        try:
            self.core.fork(
                parent.session, child.session, len(history), child, sampling, None, self.now
            )
        except (CapacityError, InvalidStep):
            return
        child.sent, child.done = list(history), list(history)
        child.takes_rows = child.is_started = True
        self.live[child.session] = child

    @precondition(has_running)
    @rule(
        number=NUMBERS, count=st.integers(1, 70), parts=st.integers(1, 3), back=st.integers(0, 20)
    )
    def send_prompt(self, number: int, count: int, parts: int, back: int) -> None:
        model = self.pick(number)
        start = len(model.sent)
        if not model.is_started:  # a chain that holds less than this shard
            start = max(0, start - back)
        tokens = model.prompt[start : start + count]
        if model.sent[:start] == model.prompt[:start]:
            size = max(1, len(tokens) // parts)
            for at in range(0, len(tokens), size):
                if not self.send(model, "prefill", start + at, tokens[at : at + size]):
                    return

    @precondition(has_running)
    @rule(number=NUMBERS)
    def send_token(self, number: int) -> None:
        model = self.pick(number)
        if len(model.sent) < MOST_TOKENS:
            self.send(model, "decode", len(model.sent), [self.count % 50])

    @precondition(has_running)
    @rule(number=NUMBERS, back=st.integers(0, 3), count=st.integers(2, 4))
    def send_draft(self, number: int, back: int, count: int) -> None:
        model = self.pick(number)
        position = max(0, len(model.sent) - back)
        if model.is_started and position + count <= MOST_TOKENS:
            tokens = [100 + (self.count + n) % 50 for n in range(count)]
            self.send(model, "verify", position, tokens)

    def send(self, model: Modelled, kind: RowKind, position: int, tokens: list[int]) -> bool:
        self.count += 1
        row = make_row(model, kind, position, tokens)
        is_full = self.core.queued_bytes + row.inputs.nbytes > MOST_BYTES
        refused = self.core.add([row], self.now)
        assert [type(one.error) for one in refused] == [QueueFull] * is_full
        if refused:
            return False
        model.is_started = True
        model.sent[position:] = tokens
        model.waits += (Sent(kind, position + n, token) for n, token in enumerate(tokens))
        model.arrays.append(SentArray(len(tokens), row.inputs.nbytes))
        return True

    @precondition(lambda self: self.live)
    @rule(number=NUMBERS)
    def send_what_is_refused(self, number: int) -> None:
        """Rows that leave a gap, or come before their session is admitted."""
        model = list(self.live.values())[number % len(self.live)]
        [refused] = self.core.add([make_row(model, "decode", len(model.sent) + 1, [1])], self.now)
        assert isinstance(refused.error, InvalidStep | QueueFull)

    @precondition(lambda self: self.live)
    @rule(number=NUMBERS)
    def send_late(self, number: int) -> None:
        """A row of another session that had the id before."""
        model = list(self.live.values())[number % len(self.live)]
        former = Modelled(model.session, model.peer, model.prompt, model.sampling)
        assert self.core.add([make_row(former, "decode", 0, [1])], self.now) == []

    @precondition(lambda self: self.live)
    @rule(number=NUMBERS, named=st.booleans())
    def close(self, number: int, named: bool) -> None:
        model = list(self.live.values())[number % len(self.live)]
        named = named and model.takes_rows and not model.waits
        self.core.close_session(model.session, hash_blocks(SALT, model.sent[:-1]) if named else ())
        del self.live[model.session]

    # --- what the shard does ---------------------------------------------------------

    @rule(seconds=st.floats(0, 2))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def plan(self) -> None:
        """Plan and run a step; its results are on their way until `finish`."""
        if self.flying is not None:
            return
        while (changes := self.core.take_changes()) is not None:
            change_samplings(self.core, self.runner, changes)
        planned, events = self.core.plan(self.now)
        self.take_events(events)
        if planned is None:
            return
        expected = [self.take_row(row) for row in planned.rows]
        output = self.runner.run(planned.step, planned.inputs, planned.samplings)
        self.flying = planned, expected, output

    def take_row(self, row: RowResult) -> list[float]:
        """Take a row off what waits of its session; return what has to come of it."""
        model = row.owner
        assert isinstance(model, Modelled)
        assert self.live[row.session] is model
        seed = model.sampling.seed if model.sampling else 0
        made: list[float] = []
        for waiting in [model.waits.popleft() for _ in range(row.tokens)]:
            model.done[waiting.position :] = [waiting.token]
            made.append(next_token(model.done, seed))
            model.arrays[0].tokens -= 1
            if not model.arrays[0].tokens:
                model.arrays.popleft()
        assert row.end == len(model.done)
        if not self.runner.is_tail or row.kind != "prefill":
            return made
        return made[-1:] if row.end >= len(model.prompt) else []

    @rule()
    def finish(self) -> None:
        """Take the results: there is one for each token, of what its session had then."""
        if self.flying is None:
            return
        planned, expected, output = self.flying
        self.flying = None
        self.now += cost(planned.step.program)
        made = values_of(output)
        for row, values in zip(planned.rows, expected, strict=True):
            assert made[row.first : row.first + row.outputs] == values
        counts = [len(values) for values in expected]
        assert [row.first for row in planned.rows] == list(itertools.accumulate([0, *counts[:-1]]))
        assert len(made) == sum(counts)
        self.core.finish(planned, cost(planned.step.program))

    @precondition(lambda self: self.flying is not None and self.count % 3 == 0)
    @rule()
    def fail(self) -> None:
        """The step that runs fails, and takes every session that runs along."""
        self.flying = None
        self.take_events(self.core.fail(InternalStepError(layers=LayerRange(0, 1))))
        self.runner.reset()
        assert not any(model.takes_rows for model in self.live.values())
        assert self.pool.available == self.pool.num_pages

    def take_events(self, events: tuple[OwnedEvent, ...]) -> None:
        for owner, event in events:
            assert isinstance(owner, Modelled)
            assert self.live[event.session] is owner
            if not isinstance(event, Admitted):
                del self.live[event.session]
            elif owner.takes_rows:
                assert event.held == len(owner.done)
                owner.is_settled = True
            else:
                owner.takes_rows = owner.is_settled = True
                owner.sent = owner.prompt[: event.held]
                owner.done = list(owner.sent)

    # --- what always holds -----------------------------------------------------------

    @invariant()
    def bytes_that_wait_are_counted_and_bounded(self) -> None:
        if hasattr(self, "core"):
            arrays = (array for model in self.live.values() for array in model.arrays)
            assert self.core.queued_bytes == sum(array.size for array in arrays) <= MOST_BYTES

    def teardown(self) -> None:
        """Let everything that waits run, and close everything: nothing is left over."""
        if not hasattr(self, "core"):
            return
        for _ in range(400):
            self.finish()
            self.plan()
            if not self.flying and not any(model.waits for model in self.live.values()):
                break
            self.now += 0.0 if self.flying else 2.0
        assert not any(model.waits for model in self.live.values() if model.is_settled)
        for session in self.live:
            self.core.close_session(session)
        self.live.clear()
        self.plan()
        assert self.flying is None
        assert self.core.queued_bytes == 0
        assert sorted(self.runner.free_slots) == [1, 2]
        assert self.pool.available == self.pool.num_pages


def make_row(model: Modelled, kind: RowKind, position: int, tokens: list[int]) -> InputRow:
    return InputRow(
        owner=model,
        session=model.session,
        kind=kind,
        position=position,
        inputs=np.array(tokens, np.int32),
    )


def values_of(output: StepOutput) -> list[float]:
    made = output.hidden if output.sampled is None else output.sampled.ids
    assert made is not None
    return made.ravel().tolist()


TestCompute = ComputeAgainstLists.TestCase
TestCompute.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)
