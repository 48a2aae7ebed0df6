"""A shard without jax: its steps run on pages of tokens, and its sampler has a small bank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from pals.engine.batch import Step
from pals.engine.compute_core import Compute, SamplingChanges
from pals.engine.work import (
    AllowedTokens,
    Array,
    PenaltyHistory,
    RowSampling,
    Sampled,
    StepOutput,
)
from pals.errors import CapacityError, InvalidStep, ShardBusy
from pals.types import LayerRange, Sampling
from tests.unit.engine.page_memory import PageMemory, next_token

LARGEST_ID = 10_000
WAIT_S = 10.0
PENALISED = Sampling(presence_penalty=1.0)


class PageRunner:
    """A `StepRunner` whose hidden state and next token are `next_token` of all that is read.

    Attributes:
        calls: What was asked of it on the compute thread, in order.
        failure: What steps raise; `open_failure` and `reset_failure` are of other calls.
        on_open: Called while a session's sampling is opened.
        entered: Set when a step begins, which goes on when `released` is set.
    """

    layers = LayerRange(0, 1)

    def __init__(
        self, num_pages: int, *, page_tokens: int = 16, is_tail: bool = True, slots: int = 2
    ) -> None:
        self.is_tail = is_tail
        self.calls: list[str] = []
        self.threads: set[str] = set()
        self.failure: Exception | None = None
        self.open_failure: Exception | None = None
        self.on_open: Callable[[], None] = lambda: None
        self.reset_failure: Exception | None = None
        self.entered = threading.Event()
        self.released = threading.Event()
        self.released.set()
        self._slots = range(slots, 0, -1)
        self.free_slots = list(self._slots)
        self._size = num_pages, page_tokens
        self.memory = PageMemory(*self._size)

    def check_inputs(self, inputs: Array) -> None:
        if inputs.max() > LARGEST_ID:
            raise InvalidStep(problem=f"token {inputs.max()} of {LARGEST_ID + 1}")

    def open_sampling(self, sampling: Sampling, history: PenaltyHistory | None) -> RowSampling:
        self._note("open" if history is None else f"open {history.tokens.tolist()}")
        self.on_open()
        if self.open_failure is not None:
            raise self.open_failure
        is_masked = history is not None and history.is_masked
        if not (sampling.presence_penalty or is_masked):
            return RowSampling(sampling, 0)
        if not self.free_slots:
            raise ShardBusy(peer="me", problem="no room for penalties")
        return RowSampling(sampling, self.free_slots.pop())

    def close_sampling(self, row_sampling: RowSampling) -> None:
        self._note("close")
        if row_sampling.slot:
            assert row_sampling.slot not in self.free_slots
            self.free_slots.append(row_sampling.slot)

    def set_allowed(self, row_sampling: RowSampling, allowed: AllowedTokens) -> None:
        assert row_sampling.slot
        self._note(f"allow {allowed.tolist()}")

    def run(
        self, step: Step, inputs: Sequence[Array], samplings: Sequence[RowSampling | None]
    ) -> StepOutput:
        self._note("run")
        self.entered.set()
        assert self.released.wait(WAIT_S)
        if self.failure is not None:
            raise self.failure
        rows = step.all_rows
        seen = self.memory.run(
            step, {r.session: i.tolist() for r, i in zip(rows, inputs, strict=True)}
        )
        if not self.is_tail:
            assert not any(samplings)
            made = [next_token(history) for row in rows for history in seen[row.session]]
            return StepOutput(np.array(made, np.float32).reshape(-1, 1), None)
        ids: list[int] = []
        for row, sampling in zip(rows, samplings, strict=True):
            if sampling is not None:
                histories = seen[row.session] if row.kind != "prefill" else seen[row.session][-1:]
                ids += [next_token(history, sampling.sampling.seed) for history in histories]
        return StepOutput(None, _sampled(ids))

    def reset(self) -> None:
        self._note("reset")
        if self.reset_failure is not None:
            raise self.reset_failure
        self.memory = PageMemory(*self._size)
        self.free_slots = list(self._slots)

    def _note(self, call: str) -> None:
        self.calls.append(call)
        self.threads.add(threading.current_thread().name)


def _sampled(ids: list[int]) -> Sampled:
    count = len(ids)
    return Sampled(
        ids=np.array(ids, np.int32),
        logprobs=np.zeros(count, np.float32),
        top_ids=np.zeros((count, 20), np.int32),
        top_logprobs=np.zeros((count, 20), np.float32),
    )


def change_samplings(core: Compute, runner: PageRunner, changes: SamplingChanges) -> None:
    """Do what the compute thread does between two steps."""
    for row_sampling in changes.closed:
        runner.close_sampling(row_sampling)
    for member in changes.opened:
        assert member.sampling is not None
        try:
            core.set_sampling(member, runner.open_sampling(member.sampling, member.history))
        except CapacityError as error:
            core.refuse(member, error)
