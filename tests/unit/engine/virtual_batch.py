"""Drivers and a chain of batchers on a clock of their own, with tokens in place of tensors.

Every shard keeps tokens where a real one keeps keys and values, and the tail makes the next
token of all that it reads through its page table: one page that is lost, shared wrongly or
overwritten changes all tokens that follow.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from pals.engine.batch import (
    Admitted,
    BatchRules,
    Ended,
    Event,
    Preempted,
    Refused,
    RowKind,
    SessionRequest,
    Step,
)
from pals.engine.batcher import Batcher
from pals.engine.buckets import BatchLimits, Buckets, Program
from pals.engine.pacing import StepCosts
from pals.engine.pages import PageFormat, PagePool
from pals.engine.prefix import PrefixScope, hash_blocks
from pals.errors import CapacityError
from pals.types import LayerRange, PeerId, SessionId
from tests.unit.engine.page_memory import PageMemory, next_token

LIMITS = BatchLimits(
    max_rows=16,
    max_context_tokens=1024,
    max_chunk_tokens=64,
    verify_tokens=4,
    page_tokens=16,
)
LATENCY_S = 0.01
RETRY_S = 0.5
STEP_S = 0.05
TOKEN_S = 0.002
MAX_STEPS = 50_000
SALT = b"s" * 32


def cost(program: Program) -> float:
    """Return what a step takes: its weights once, and something for each token."""
    return STEP_S + TOKEN_S * program.tokens


def make_batcher(
    num_pages: int, limits: BatchLimits = LIMITS, rules: BatchRules | None = None
) -> tuple[Batcher, PagePool]:
    size = PageFormat(page_tokens=limits.page_tokens, token_bytes=1)
    scope = PrefixScope(manifest=b"m" * 32, layers=LayerRange(0, 1), dtype="f32", kv_dtype="f32")
    pool = PagePool(size, budget_bytes=(num_pages + 1) * size.page_bytes, scope=scope)
    buckets = Buckets(limits)
    costs = StepCosts({program: cost(program) for program in buckets.programs})
    return Batcher(buckets, pool, rules or BatchRules(), costs), pool


@dataclass(kw_only=True)
class Answer:
    """One sequence that a driver wants, and how far it is.

    Attributes:
        draft: Tokens of a row after the prompt; more than one are verified.
        forks: Answers to the same prompt that begin once it is computed.
        fed: Tokens by position as the chain got them, drafts included.
    """

    peer: PeerId
    prompt: list[int]
    max_new: int
    seed: int = 0
    draft: int = 1
    arrives: float = 0.0
    deadline: float = float("inf")
    forks: list[Answer] = field(default_factory=list)

    tokens: list[int] = field(default_factory=list)
    fed: list[int] = field(default_factory=list)
    session: SessionId | None = None
    former: SessionId | None = None
    held: dict[int, int] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    preemptions: int = 0
    error: Exception | None = None
    is_opening: bool = False
    started: float | None = None

    @property
    def history(self) -> list[int]:
        return self.prompt + self.tokens

    @property
    def is_done(self) -> bool:
        return len(self.tokens) >= self.max_new or self.error is not None

    @cached_property
    def expected(self) -> list[int]:
        """The tokens of a model that answers nobody else."""
        history = list(self.prompt)
        for _ in range(self.max_new):
            history.append(next_token(history, self.seed))
        return history[len(self.prompt) :]


@dataclass
class Shard:
    """A batcher, its memory, and the inputs of rows that wait for it."""

    batcher: Batcher
    pool: PagePool
    memory: PageMemory
    inputs: dict[SessionId, list[tuple[int, list[int]]]] = field(default_factory=dict)
    busy: bool = False
    wake: float = float("inf")
    steps: list[Step] = field(default_factory=list)

    def cut_inputs(self, session: SessionId, position: int, tokens: int) -> list[int]:
        """Take the inputs of a row that runs; they come in the order of their arrival."""
        waiting, found = self.inputs[session], list[int]()
        while len(found) < tokens:
            at, part = waiting.pop(0)
            assert at == position + len(found)
            wanted = tokens - len(found)
            found += part[:wanted]
            if part[wanted:]:
                waiting.insert(0, (at + wanted, part[wanted:]))
        return found


class World:
    """A chain of shards and everybody who uses it, until all answers are there."""

    def __init__(
        self,
        num_pages: Sequence[int],
        *,
        limits: BatchLimits = LIMITS,
        rules: BatchRules | None = None,
    ) -> None:
        self.now = 0.0
        self.limits = limits
        self.shards: list[Shard] = []
        for count in num_pages:
            batcher, pool = make_batcher(count, limits, rules)
            self.shards.append(Shard(batcher, pool, PageMemory(count, limits.page_tokens)))
        self.answers: dict[SessionId, Answer] = {}
        self._todo: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count(1)
        self.on_token: Callable[[Answer], None] = lambda _: None

    def at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._todo, (time, next(self._numbers), action))

    def ask(self, answer: Answer) -> Answer:
        self.at(max(self.now, answer.arrives), lambda: self._open(answer))
        return answer

    def run(self, until: float = float("inf")) -> None:
        """Run until nothing is left to do; everything asked for is over then."""
        for _ in range(MAX_STEPS):
            if not self._todo or self._todo[0][0] > until:
                return
            self.now, _, action = heapq.heappop(self._todo)
            action()
        raise AssertionError(f"no end in sight at {self.now}")

    def cancel(self, answer: Answer) -> None:
        """Close an answer's session on every shard."""
        self._close(answer)
        answer.error = InterruptedError()

    # --- drivers ---------------------------------------------------------------------

    def _new_id(self) -> SessionId:
        return SessionId(next(self._numbers).to_bytes(16, "big"))

    def _open(self, answer: Answer) -> None:
        """Ask every shard for room; a retry keeps the place that a preempted session had."""
        if answer.is_done:
            return
        session = answer.session = self._new_id()
        self.answers[session] = answer
        answer.held.clear()
        answer.is_opening = True
        answer.fed = list(answer.history)
        request = SessionRequest(
            session=session,
            peer=answer.peer,
            prompt_tokens=len(answer.history),
            max_tokens=len(answer.prompt) + answer.max_new,
            names=hash_blocks(SALT, answer.history),
            replaces=answer.former,
            deadline=answer.deadline,
        )
        for shard in self.shards:
            try:
                shard.batcher.open(request, self.now)
            except CapacityError as error:
                if not error.retryable:
                    answer.error = error
                self._retry(answer)
                return
        self._wake_all()

    def _retry(self, answer: Answer) -> None:
        self._close(answer)
        if answer.error is None:
            self.at(self.now + RETRY_S, lambda: self._open(answer))

    def _close(self, answer: Answer) -> None:
        if answer.session is None:
            return
        names = hash_blocks(SALT, answer.history[:-1]) if answer.tokens else ()
        for shard in self.shards:
            shard.batcher.close(answer.session, names)
            shard.inputs.pop(answer.session, None)
        self.answers.pop(answer.session, None)
        answer.former, answer.session = answer.session, None
        self._wake_all()

    def _fork(self, parent: Answer, child: Answer) -> None:
        position = len(parent.prompt) - 1
        session = child.session = self._new_id()
        child.is_opening = False
        child.fed = parent.prompt[:position]
        self.answers[session] = child
        try:
            assert parent.session is not None
            for shard in self.shards:
                shard.batcher.fork(parent.session, session, position, self.now)
        except CapacityError:
            self._retry(child)
            return
        self._feed(child, "decode", position, [parent.prompt[position]])
        self._wake_all()

    def _take_event(self, number: int, event: Event) -> None:
        answer = self.answers.get(event.session)
        if answer is None:
            return
        match event:
            case Admitted(_, held):
                answer.held[number] = held
                if answer.is_opening and len(answer.held) == len(self.shards):
                    self._start(answer)
            case Refused(_, error) | Ended(_, error):
                if answer.deadline <= self.now:
                    answer.error = error
                self._retry(answer)
            case Preempted():
                answer.preemptions += 1
                self._close(answer)
                self.at(self.now + LATENCY_S, lambda: self._open(answer))

    def _start(self, answer: Answer) -> None:
        position = min(*answer.held.values(), len(answer.history) - 1)
        answer.is_opening = False
        answer.started = self.now
        self._feed(answer, "prefill", position, answer.history[position:])

    def _feed(self, answer: Answer, kind: RowKind, position: int, tokens: list[int]) -> None:
        answer.fed[position:] = tokens
        session = answer.session
        assert session is not None
        self.at(self.now + LATENCY_S, lambda: self._arrive(0, session, kind, position, tokens))

    def _take_tokens(self, answer: Answer, histories: list[list[int]]) -> None:
        """Take what the tail made of a row: of a draft, as much as was right."""
        for history in histories:
            if history != answer.history or answer.is_done:
                break  # behind a drafted token that was wrong
            answer.tokens.append(next_token(history, answer.seed))
            answer.times.append(self.now)
        for child in answer.forks:
            self._fork(answer, child)
        answer.forks = []
        self.on_token(answer)
        if answer.is_done:
            self._close(answer)
        elif answer.session is not None:
            self._feed_next(answer)

    def _feed_next(self, answer: Answer) -> None:
        position = len(answer.history) - 1
        left = len(answer.prompt) + answer.max_new - position
        tokens = [answer.history[-1]]
        right = answer.expected[len(answer.tokens) :]
        while len(tokens) < min(answer.draft, left):
            guess = right[len(tokens) - 1] if (position + len(tokens)) % 3 else 0
            tokens.append(guess)
        self._feed(answer, "verify" if len(tokens) > 1 else "decode", position, tokens)

    # --- shards ----------------------------------------------------------------------

    def _arrive(
        self, number: int, session: SessionId, kind: RowKind, position: int, tokens: list[int]
    ) -> None:
        shard = self.shards[number]
        if shard.batcher.add(session, kind, position, len(tokens), self.now):
            shard.inputs.setdefault(session, []).append((position, list(tokens)))
        self._wake(number)

    def _wake_all(self) -> None:
        for number in range(len(self.shards)):
            self.at(self.now, lambda number=number: self._wake(number))

    def _wake(self, number: int) -> None:
        """Plan and run a step unless one runs."""
        shard = self.shards[number]
        if shard.busy:
            return
        step = shard.batcher.plan(self.now)
        events = shard.batcher.take_events()
        if step is not None:
            self._begin(number, step)
        for event in events:
            self._take_event(number, event)
        if step is None and self.now < (wake := shard.batcher.next_at()) < shard.wake:
            shard.wake = wake
            self.at(wake, lambda: self._wake_late(number))

    def _wake_late(self, number: int) -> None:
        self.shards[number].wake = float("inf")
        self._wake(number)

    def _begin(self, number: int, step: Step) -> None:
        shard = self.shards[number]
        check_step(step, shard.batcher, self.limits)
        shard.steps.append(step)
        inputs = {
            row.session: shard.cut_inputs(row.session, row.position, row.tokens)
            for row in step.all_rows
        }
        seen = shard.memory.run(step, inputs)
        for row in step.all_rows:
            answer = self.answers[row.session]
            assert seen[row.session][-1] == answer.fed[: row.end]
        shard.busy = True
        self.at(self.now + cost(step.program), lambda: self._end(number, step, inputs, seen))

    def _end(
        self,
        number: int,
        step: Step,
        inputs: dict[SessionId, list[int]],
        seen: dict[SessionId, list[list[int]]],
    ) -> None:
        shard = self.shards[number]
        shard.busy = False
        shard.batcher.finish(step, cost(step.program))
        for row in step.all_rows:
            answer = self.answers.get(row.session)
            if answer is None:
                continue
            if number + 1 < len(self.shards):
                args = (number + 1, row.session, row.kind, row.position, inputs[row.session])
                self.at(self.now + LATENCY_S, lambda args=args: self._arrive(*args))
            elif row.kind != "prefill" or row.end == len(answer.history):
                self._take_tokens(answer, seen[row.session])
        self._wake(number)


def check_step(step: Step, batcher: Batcher, limits: BatchLimits) -> None:
    """Check that a step is what its program holds."""
    program = step.program
    assert program in batcher.programs
    assert len(step.rows) <= program.rows
    assert all(1 <= row.tokens <= program.row_tokens for row in step.rows)
    assert all(row.kind != "prefill" for row in step.rows)
    assert (step.chunk is None) == (program.chunk_tokens == 0)
    if step.chunk is not None:
        assert step.chunk.kind == "prefill"
        assert 1 <= step.chunk.tokens <= program.chunk_tokens
    sessions = [row.session for row in step.all_rows]
    assert len(set(sessions)) == len(sessions)
    for row in step.all_rows:
        assert len(row.pages) == limits.pages_of(row.end) <= program.pages
    assert batcher.num_running >= len(sessions)
