"""A whole model in one process: shards one after another, without any network.

What a driver and its chain do over links, in a few calls: for programs of one's own, and for
tests. Prompts that begin alike share their pages, as they do over a chain.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pals.engine.batch import Admitted, Ended, Event, Preempted, Refused, RowKind, SessionRequest
from pals.engine.batcher import Batcher
from pals.engine.compute_core import Compute, Member, Planned
from pals.engine.prefix import SALT_BYTES, hash_blocks
from pals.engine.work import Array, InputRow, PenaltyHistory, StepOutput, StepRunner
from pals.errors import InternalStepError, InvalidConfig, InvalidStep, PalsError, ShardBusy
from pals.types import PeerId, Sampling, SessionId

DRIVER = PeerId("local")
MAX_QUEUED_BYTES = 1 << 30
NEVER = float("inf")
LEAST_WAIT_S = 1e-3
_GREEDY = Sampling()
_MANIFEST = bytes(32)


class LocalShard(StepRunner, Protocol):
    """What a chain is made of: a `pals.engine.Shard`."""

    def make_batcher(self, manifest: bytes) -> Batcher: ...


class LocalChain:
    """Shards of one model that together are all of it.

    One thread uses it. Answers may be generated in turns: each has its own session.

    Args:
        shards: Head first, tail last, of the same model.
    """

    def __init__(self, shards: Sequence[LocalShard]) -> None:
        """Begin with empty caches.

        Raises:
            InvalidConfig: The shards do not follow one another, or are not a whole model.
        """
        check_whole(shards)
        self._stages = [_Stage(shard) for shard in shards]
        self._salt = os.urandom(SALT_BYTES)

    def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling = _GREEDY, *, max_new_tokens: int
    ) -> Iterator[int]:
        """Yield the tokens of an answer as they are computed.

        Nothing runs before the first is asked for. Close the iterator to break it off.

        Args:
            prompt_ids: Token ids, one at least.
            sampling: How each token is chosen; greedy when left out.
            max_new_tokens: How many there will be; whoever calls stops at an end token.

        Raises:
            InvalidStep: A token id or a length is out of range.
            CapacityError: The shards have no room for prompt and answer.
        """
        history = list(prompt_ids)
        names = hash_blocks(self._salt, history)
        request = _new_request(len(history), max_new_tokens, names)
        session, prompt = request.session, _token_ids(history)
        self._stages[0].shard.check_inputs(prompt)
        try:
            held = [stage.open(request, sampling, prompt) for stage in self._stages]
            position = min(*held, len(history) - 1)
            kind: RowKind = "prefill"
            while len(history) < request.max_tokens:
                inputs = _token_ids(history[position:])
                token = self._forward(session, kind, position, inputs)
                kind, position = "decode", len(history)
                history.append(token)
                yield token
        finally:
            names = hash_blocks(self._salt, history[:-1])
            for stage in self._stages:
                stage.close(session, names)

    def embed(self, prompt_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the mean of a prompt's last hidden states after the final norm, ``[D]``.

        Raises:
            InvalidStep: A token id or the length is out of range.
            CapacityError: The shards have no room for the prompt.
        """
        prompt = _token_ids(prompt_ids)
        # No names: what is held already is not computed, and could not be pooled.
        request = _new_request(len(prompt), 1, ())
        self._stages[0].shard.check_inputs(prompt)
        try:
            for stage in self._stages:
                stage.open(request, Sampling(pooling=True), prompt)
            pooled = self._run_all(request.session, "prefill", 0, prompt).pooled
        finally:
            for stage in self._stages:
                stage.close(request.session, ())
        assert pooled is not None
        return pooled / np.float32(len(prompt))

    def _forward(self, session: SessionId, kind: RowKind, position: int, inputs: Array) -> int:
        sampled = self._run_all(session, kind, position, inputs).sampled
        assert sampled is not None
        return int(sampled.ids[-1])

    def _run_all(
        self, session: SessionId, kind: RowKind, position: int, inputs: Array
    ) -> StepOutput:
        """Run tokens through every shard, and return the last output of the last one."""
        for stage in self._stages[:-1]:
            hidden = [output.hidden for output in stage.run(session, kind, position, inputs)]
            inputs = np.concatenate([part for part in hidden if part is not None])
        return self._stages[-1].run(session, kind, position, inputs)[-1]


class _Stage:
    """One shard with its sessions, of which one has rows at a time.

    Its clock stands still but for where nothing can run before some moment: then it is that.
    """

    def __init__(self, shard: LocalShard) -> None:
        self.shard = shard
        self._core = Compute(
            shard.make_batcher(_MANIFEST), is_tail=shard.is_tail, max_queued_bytes=MAX_QUEUED_BYTES
        )
        self._now = 0.0
        self._held: dict[SessionId, int] = {}
        self._over: dict[SessionId, PalsError] = {}

    def open(
        self, request: SessionRequest, sampling: Sampling, prompt: npt.NDArray[np.int32]
    ) -> int:
        """Return how many tokens the shard holds of the prompt; raises when it has no room."""
        tail = self.shard.is_tail
        history = PenaltyHistory(prompt, 0) if tail else None
        self._core.open(request, DRIVER, sampling if tail else None, history, self._now)
        while request.session not in self._held:
            planned = self._plan(request.session)
            assert planned is None
        return self._held.pop(request.session)

    def close(self, session: SessionId, names: tuple[bytes, ...]) -> None:
        self._core.close_session(session, names)
        self._over.pop(session, None)

    def run(
        self, session: SessionId, kind: RowKind, position: int, inputs: Array
    ) -> list[StepOutput]:
        """Run the tokens of one session, in as many steps as they take."""
        row = InputRow(owner=DRIVER, session=session, kind=kind, position=position, inputs=inputs)
        for refused in self._core.add([row], self._now):
            raise refused.error
        outputs: list[StepOutput] = []
        left = len(inputs)
        while left:
            if (planned := self._plan(session)) is not None:
                outputs.append(self._run(planned))
                left -= sum(row.tokens for row in planned.rows)
        return outputs

    def _plan(self, session: SessionId) -> Planned | None:
        """Return the next step; None when there is none yet. Raises when the session is over."""
        while (changes := self._core.take_changes()) is not None:
            for row_sampling in changes.closed:
                self.shard.close_sampling(row_sampling)
            for member in changes.opened:
                self._open_sampling(member)
        planned, events = self._core.plan(self._now)
        for owned in events:
            self._note(owned.event)
        if session in self._over:
            raise self._over.pop(session)
        if planned is None and not events:
            self._now = max(self._core.batcher.next_at(), self._now + LEAST_WAIT_S)
            assert self._now < NEVER, "it waits for nothing"
        return planned

    def _open_sampling(self, member: Member) -> None:
        assert member.sampling is not None
        try:
            row_sampling = self.shard.open_sampling(member.sampling, member.history)
        except PalsError as error:
            self._core.refuse(member, error)
        else:
            self._core.set_sampling(member, row_sampling)

    def _run(self, planned: Planned) -> StepOutput:
        started = time.perf_counter()
        try:
            output = self.shard.run(planned.step, planned.inputs, planned.samplings)
        except Exception:  # XLA's errors have no common type; it is raised again
            for owned in self._core.fail(InternalStepError(layers=self.shard.layers)):
                self._note(owned.event)
            self.shard.reset()
            raise
        self._core.finish(planned, time.perf_counter() - started)
        return self._core.pool(planned, output)

    def _note(self, event: Event) -> None:
        match event:
            case Admitted(session, held):
                self._held[session] = held
            case Refused(session, error) | Ended(session, error):
                self._over[session] = error
            case Preempted(session):
                problem = "its part of the KV cache went to another answer"
                self._over[session] = ShardBusy(peer=DRIVER, problem=problem)


def check_whole(shards: Sequence[LocalShard]) -> None:
    """Raise unless shards follow one another from the first layer to the last.

    Raises:
        InvalidConfig: They do not.
    """
    layers = ", ".join(str(shard.layers) for shard in shards) or "none"
    follows = all(a.layers.stop == b.layers.start for a, b in itertools.pairwise(shards))
    if not (shards and follows and shards[0].layers.start == 0 and shards[-1].is_tail):
        raise InvalidConfig(
            source="the shards of a chain",
            problem=f"their layers are {layers}",
            advice="name all layers of the model once, in order",
        )


def _new_request(
    prompt_tokens: int, max_new_tokens: int, names: tuple[bytes, ...]
) -> SessionRequest:
    return SessionRequest(
        session=SessionId(os.urandom(16)),
        peer=DRIVER,
        prompt_tokens=prompt_tokens,
        max_tokens=prompt_tokens + max_new_tokens,
        names=names,
    )


def _token_ids(tokens: Sequence[int]) -> npt.NDArray[np.int32]:
    try:
        return np.array(tokens, np.int32)
    except OverflowError:
        raise InvalidStep(problem="a token id has more than 31 bits") from None
