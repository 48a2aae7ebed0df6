"""Drives one whole-model shard through a batcher, by a schedule that a test draws.

Sessions come and go while others run, prompts are cut as the batcher likes, pages run out,
forks share what they have and turns of a conversation find their pages again: whatever
happens, each answer has to be the one that the session gets alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

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
from pals.engine.prefix import hash_blocks
from pals.engine.shard import Shard
from pals.engine.work import RowSampling
from pals.types import PeerId, Sampling, SessionId

PEER = PeerId("12D3tester")
SALT = b"s" * 32
STEP_S = 0.01
MAX_STEPS = 4000
GREEDY = Sampling()


@dataclass(kw_only=True)
class Ask:
    """One answer that is wanted.

    Attributes:
        prompt: Token ids.
        count: Tokens of the answer.
        sampling: How it is sampled.
        arrives: After how many steps it is asked for.
        draft: Tokens of its rows after the prompt; more than 1 are verified.
        forks: Answers that begin with this one's prompt, once it is computed.
    """

    prompt: list[int]
    count: int
    sampling: Sampling = GREEDY
    arrives: int = 0
    draft: int = 1
    forks: list[Ask] = field(default_factory=list)

    tokens: list[int] = field(default_factory=list)
    session: SessionId | None = None
    former: SessionId | None = None
    held: int = 0
    preemptions: int = 0

    @property
    def history(self) -> list[int]:
        return self.prompt + self.tokens

    @property
    def is_done(self) -> bool:
        return len(self.tokens) >= self.count


class Schedule:
    """A shard, its batcher and who asks it."""

    def __init__(self, shard: Shard, rules: BatchRules | None = None) -> None:
        shard.reset()
        self.shard = shard
        self.batcher = shard.make_batcher(bytes(32), rules or BatchRules())
        self.steps: list[Step] = []
        self.now = 0.0
        self._asks: list[Ask] = []
        self._of: dict[SessionId, Ask] = {}
        self._inputs: dict[SessionId, list[int]] = {}
        self._numbers = itertools.count(1)
        self.guess: Callable[[Ask], list[int]] = lambda _: []

    def run(self, asks: list[Ask]) -> None:
        """Run until every answer is whole."""
        self._asks = list(asks)
        for number in range(MAX_STEPS):
            for ask in [ask for ask in self._asks if ask.session is None and not ask.is_done]:
                if ask.arrives <= number:
                    self._open(ask)
            step = self.batcher.plan(self.now)
            for event in self.batcher.take_events():
                self._take_event(event)
            if step is not None:
                self._run_step(step)
            self.now += STEP_S
            if all(ask.is_done for ask in self._asks):
                return
        raise AssertionError("no end in sight")

    def _new_id(self, ask: Ask) -> SessionId:
        session = ask.session = SessionId(next(self._numbers).to_bytes(16, "big"))
        self._of[session] = ask
        return session

    def _open(self, ask: Ask) -> None:
        request = SessionRequest(
            session=self._new_id(ask),
            peer=PEER,
            prompt_tokens=len(ask.history),
            max_tokens=len(ask.prompt) + ask.count,
            names=hash_blocks(SALT, ask.history),
            replaces=ask.former,
        )
        self.batcher.open(request, self.now)

    def _close(self, ask: Ask) -> None:
        assert ask.session is not None
        self.batcher.close(ask.session, hash_blocks(SALT, ask.history[:-1]))
        self._of.pop(ask.session)
        self._inputs.pop(ask.session, None)
        ask.former, ask.session = ask.session, None

    def _take_event(self, event: Event) -> None:
        ask = self._of.get(event.session)
        if ask is None:
            return
        match event:
            case Admitted(_, held):
                ask.held = held
                if not ask.tokens or ask.former is not None:
                    self._begin(ask, min(held, len(ask.history) - 1))
            case Preempted():
                ask.preemptions += 1
                self._close(ask)
            case Refused() | Ended():
                self._close(ask)

    def _begin(self, ask: Ask, position: int) -> None:
        if ask.session in self._inputs:
            return  # a fork's first row is here already
        self._feed(ask, "prefill", position, ask.history[position:])

    def _feed(self, ask: Ask, kind: RowKind, position: int, tokens: list[int]) -> None:
        assert ask.session is not None
        assert self.batcher.add(ask.session, kind, position, len(tokens), self.now)
        kept = self._inputs.setdefault(ask.session, [0] * position)
        kept[position:] = tokens

    def _run_step(self, step: Step) -> None:
        self.steps.append(step)
        inputs = [
            np.array(self._inputs[row.session][row.position : row.end], np.int32)
            for row in step.all_rows
        ]
        samplings = [
            RowSampling(self._of[row.session].sampling)
            if row.kind != "prefill" or row.end == len(self._of[row.session].history)
            else None
            for row in step.all_rows
        ]
        output = self.shard.run(step, inputs, samplings)
        self.batcher.finish(step, STEP_S)
        assert output.sampled is not None
        ids = output.sampled.ids.tolist()
        for row, sampling in zip(step.all_rows, samplings, strict=True):
            if sampling is None:
                continue
            ends = [row.end] if row.kind == "prefill" else [*range(row.position + 1, row.end + 1)]
            sampled, ids = ids[: len(ends)], ids[len(ends) :]
            if (ask := self._of.get(row.session)) is not None:
                self._take_tokens(ask, ends, sampled)

    def _take_tokens(self, ask: Ask, ends: list[int], sampled: list[int]) -> None:
        """Take of a row its tokens, one for each end, as many as its drafts were right."""
        assert ask.session is not None
        fed = self._inputs[ask.session]
        for end, token in zip(ends, sampled, strict=True):
            if end != len(ask.history) or ask.is_done or fed[end - 1] != ask.history[-1]:
                break
            ask.tokens.append(token)
        for child in ask.forks:
            self._fork(ask, child)
        ask.forks = []
        if ask.is_done:
            self._close(ask)
        else:
            self._feed_next(ask)

    def _feed_next(self, ask: Ask) -> None:
        position = len(ask.history) - 1
        left = len(ask.prompt) + ask.count - position
        tokens = [ask.history[-1], *self.guess(ask)][: min(ask.draft, left)]
        self._feed(ask, "verify" if len(tokens) > 1 else "decode", position, tokens)

    def _fork(self, parent: Ask, child: Ask) -> None:
        position = len(parent.prompt) - 1
        self._asks.append(child)
        session = self._new_id(child)
        assert parent.session is not None
        self.batcher.fork(parent.session, session, position, self.now)
        self._inputs[session] = parent.prompt[:position]
        self._feed(child, "decode", position, parent.prompt[position:])
