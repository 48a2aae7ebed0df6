"""A batcher whose sessions, rows and steps come in any order, against lists of tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pals.engine.batch import (
    Admitted,
    BatchRules,
    Ended,
    Preempted,
    RowKind,
    SessionRequest,
    Step,
)
from pals.engine.prefix import hash_blocks
from pals.errors import CapacityError, InternalStepError, InvalidStep
from pals.types import PeerId, SessionId
from tests.unit.engine.page_memory import PageMemory
from tests.unit.engine.virtual_batch import LIMITS, check_step, cost, make_batcher

PEERS = [PeerId(f"12D3{name}") for name in ("alice", "bob", "carol")]
PROMPTS = [[n] * 64 + [n + 1] * 40 for n in range(2)]
SALT = b"s" * 32
NUMBERS = st.integers(0, 9)
RULES = BatchRules(max_sessions=6, max_waiting_sessions=3, max_waiting_tokens=400)
MOST = 240


@dataclass
class Modelled:
    """A session as its driver sees it.

    Attributes:
        prompt: What it was opened for.
        rows: That wait, each with the tokens that are left of it.
        sent: All tokens by position, those that wait included.
        done: Tokens that ran, by position.
        parent: The session that it is a fork of, until it has its pages.
    """

    peer: PeerId
    prompt: list[int]
    sent: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    rows: list[tuple[RowKind, int, list[int]]] = field(default_factory=list)
    is_started: bool = False


class BatcherAgainstLists(RuleBasedStateMachine):
    @initialize(num_pages=st.integers(15, 40))
    def begin(self, num_pages: int) -> None:
        self.batcher, self.pool = make_batcher(num_pages, rules=RULES)
        self.memory = PageMemory(num_pages, LIMITS.page_tokens)
        self.now = 0.0
        self.count = 0
        self.waiting: dict[SessionId, Modelled] = {}
        self.running: dict[SessionId, Modelled] = {}
        self.forks: dict[SessionId, SessionId] = {}
        self.flying: tuple[Step, dict[SessionId, Modelled]] | None = None

    # --- what drivers do -------------------------------------------------------------

    def new_id(self) -> SessionId:
        self.count += 1
        return SessionId(self.count.to_bytes(16, "big"))

    def pick(self, number: int) -> tuple[SessionId, Modelled]:
        return list(self.running.items())[number % len(self.running)]

    @rule(peer=st.sampled_from(PEERS), prompt=st.sampled_from(PROMPTS), deadline=st.booleans())
    def open(self, peer: PeerId, prompt: list[int], deadline: bool) -> None:
        request = SessionRequest(
            session=self.new_id(),
            peer=peer,
            prompt_tokens=len(prompt),
            max_tokens=MOST,
            names=hash_blocks(SALT, prompt),
            deadline=self.now + 5 if deadline else float("inf"),
        )
        try:
            self.batcher.open(request, self.now)
        except CapacityError:
            return
        self.waiting[request.session] = Modelled(peer, prompt)

    @precondition(lambda self: self.running)
    @rule(number=NUMBERS, count=st.integers(1, 70), back=st.integers(0, 20))
    def send_prompt(self, number: int, count: int, back: int) -> None:
        session, model = self.pick(number)
        start = len(model.sent)
        if not model.is_started:  # a chain that holds less than this shard
            start = max(0, start - back)
        tokens = model.prompt[start : start + count]
        if tokens and model.sent[:start] == model.prompt[:start]:
            self.send(session, model, "prefill", start, tokens)

    @precondition(lambda self: self.running)
    @rule(number=NUMBERS)
    def send_token(self, number: int) -> None:
        session, model = self.pick(number)
        if len(model.sent) < MOST:
            self.send(session, model, "decode", len(model.sent), [self.count % 50])

    @precondition(lambda self: self.running)
    @rule(number=NUMBERS, back=st.integers(0, 3), count=st.integers(2, 4))
    def send_draft(self, number: int, back: int, count: int) -> None:
        session, model = self.pick(number)
        position = max(0, len(model.sent) - back)
        if model.is_started and position + count <= MOST:
            tokens = [100 + (self.count + n) % 50 for n in range(count)]
            self.send(session, model, "verify", position, tokens)

    def send(
        self, session: SessionId, model: Modelled, kind: RowKind, position: int, tokens: list[int]
    ) -> None:
        self.count += 1
        try:
            assert self.batcher.add(session, kind, position, len(tokens), self.now)
        except CapacityError:
            waiting = sum(len(t) for m in self.running.values() for _, _, t in m.rows)
            assert waiting + len(tokens) > RULES.max_waiting_tokens
            return
        model.is_started = True
        model.sent[position:] = tokens
        model.rows.append((kind, position, list(tokens)))

    @precondition(lambda self: self.running)
    @rule(number=NUMBERS, back=st.integers(0, 30))
    def fork(self, number: int, back: int) -> None:
        parent, model = self.pick(number)
        if self.forks.get(parent) or any(kind != "prefill" for kind, _, _ in model.rows):
            return  # drivers fork only what has come back from the tail, or a prompt
        position = len(model.sent) - back
        child = self.new_id()
        try:
            self.batcher.fork(parent, child, position, self.now)
        except (CapacityError, InvalidStep):
            return
        history = model.sent[:position]
        self.running[child] = Modelled(
            model.peer, list(history), list(history), list(history), is_started=True
        )
        self.forks[child] = parent

    @precondition(lambda self: self.running or self.waiting)
    @rule(number=NUMBERS, named=st.booleans())
    def close(self, number: int, named: bool) -> None:
        everyone = [*self.running, *self.waiting]
        session = everyone[number % len(everyone)]
        model = self.running.get(session)
        named = named and model is not None and not model.rows
        self.batcher.close(session, hash_blocks(SALT, model.sent[:-1]) if named and model else ())
        self.running.pop(session, None)
        self.waiting.pop(session, None)
        self.forks.pop(session, None)

    # --- what the shard does ---------------------------------------------------------

    @rule(seconds=st.floats(0, 2))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def plan(self) -> None:
        if self.flying is not None:
            return
        step = self.batcher.plan(self.now)
        self.take_events()
        if step is None:
            return
        check_step(step, self.batcher, LIMITS)
        inputs = {row.session: self.take_row(row.session, row.position, row.tokens)
                  for row in step.all_rows}  # fmt: skip
        seen = self.memory.run(step, inputs)
        for row in step.all_rows:
            model = self.running[row.session]
            model.done[row.position :] = inputs[row.session]
            assert seen[row.session][-1] == model.done
        members = {row.session: self.running[row.session] for row in step.all_rows}
        self.flying = step, members

    def take_row(self, session: SessionId, position: int, count: int) -> list[int]:
        """Take tokens off the session's queue: they have to be the first that wait there."""
        tokens: list[int] = []
        rows = self.running[session].rows
        while len(tokens) < count:
            kind, at, waiting = rows.pop(0)
            assert at == position + len(tokens)
            wanted = count - len(tokens)
            tokens += waiting[:wanted]
            if waiting[wanted:]:
                assert kind == "prefill"
                rows.insert(0, (kind, at + wanted, waiting[wanted:]))
        return tokens

    def take_events(self) -> None:
        for event in self.batcher.take_events():
            match event:
                case Admitted(session, held) if session in self.waiting:
                    model = self.waiting.pop(session)
                    model.sent, model.done = model.prompt[:held], model.prompt[:held]
                    self.running[session] = model
                case Admitted(session, held):
                    assert held == len(self.running[session].done)
                    del self.forks[session]
                case Preempted(session) | Ended(session):
                    del self.running[session]
                    self.forks.pop(session, None)
                case refused:
                    del self.waiting[refused.session]

    @rule()
    def finish(self) -> None:
        if self.flying is not None:
            step, _ = self.flying
            self.now += cost(step.program)
            self.batcher.finish(step, cost(step.program))
            self.flying = None

    @precondition(lambda self: self.count % 11 == 10)
    @rule()
    def fail(self) -> None:
        self.batcher.fail(InternalStepError(layers="0:1"))
        self.take_events()
        assert not self.running
        self.flying = None
        assert self.pool.available == self.pool.num_pages

    # --- what always holds -----------------------------------------------------------

    @invariant()
    def every_session_reads_what_it_wrote(self) -> None:
        for session, model in getattr(self, "running", {}).items():
            if session not in self.forks:
                table, length = self.pool.table(session), self.pool.length(session)
                assert self.memory.read(table, length) == model.done[:length]

    @invariant()
    def budget_holds(self) -> None:
        if hasattr(self, "pool"):
            used = {
                page for s in self.running if s not in self.forks for page in self.pool.table(s)
            }
            assert len(used) + self.pool.available == self.pool.num_pages
            assert self.batcher.num_running == len(self.running) <= RULES.max_sessions

    def teardown(self) -> None:
        """Let everything that waits run: who is in the way of the oldest gives way."""
        if not hasattr(self, "batcher"):
            return
        for _ in range(400):
            self.finish()
            self.plan()
            self.now += 0.0 if self.flying else 2.0
        assert not any(model.rows for s, model in self.running.items() if s not in self.forks)
        assert not self.waiting or self.running
        for session in [*self.running, *self.waiting]:
            self.batcher.close(session)
        assert self.pool.available == self.pool.num_pages


TestBatcher = BatcherAgainstLists.TestCase
TestBatcher.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)
