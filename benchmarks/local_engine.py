"""One shard that holds a whole model, driven in its own process as `pals shard` drives it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from pals.engine.batch import BatchRules, RowKind, SessionRequest, Step, StepRow
from pals.engine.work import Array, RowSampling
from pals.types import PeerId, Sampling, SessionId

if TYPE_CHECKING:
    from pals.engine.shard import Shard

GREEDY = RowSampling(Sampling(), 0)
PEER = PeerId("benchmark")


class Tokens(NamedTuple):
    """Ids ``int32[t]`` that stand at ``position`` and after it."""

    position: int
    ids: Array


class LocalEngine:
    """Runs the tokens of sessions, in as many steps as that takes, and samples greedily.

    Args:
        shard: Head and tail in one, and warm.
        rules: Of its batcher; those of the shard's limits when left out.
    """

    def __init__(self, shard: Shard, rules: BatchRules | None = None) -> None:
        self._shard = shard
        self._batcher = shard.make_batcher(bytes(32), rules)
        self._opened = 0

    def open(self, *, prompt_tokens: int, max_tokens: int) -> SessionId:
        """Begin a session while no tokens wait."""
        self._opened += 1
        session = SessionId(self._opened.to_bytes(16, "big"))
        request = SessionRequest(
            session=session, peer=PEER, prompt_tokens=prompt_tokens, max_tokens=max_tokens
        )
        self._batcher.open(request, time.monotonic())
        assert self._batcher.plan(time.monotonic()) is None
        return session

    def close(self, session: SessionId) -> None:
        self._batcher.close(session)

    def run(self, rows: Mapping[SessionId, Tokens]) -> dict[SessionId, Array]:
        """Run some tokens of some sessions; return the token after each one's last."""
        for session, tokens in rows.items():
            kind: RowKind = "decode" if len(tokens.ids) == 1 else "prefill"
            position, count = tokens.position, len(tokens.ids)
            assert self._batcher.add(session, kind, position, count, time.monotonic())
        sampled: dict[SessionId, Array] = {}
        while len(sampled) < len(rows):
            sampled |= self._run_step(self._plan(), rows)
        return sampled

    def _plan(self) -> Step:
        """Return the next step; rows of other sessions, for which it might wait, do not come."""
        step = self._batcher.plan(time.monotonic()) or self._batcher.plan(self._batcher.next_at())
        assert step is not None
        return step

    def _run_step(self, step: Step, rows: Mapping[SessionId, Tokens]) -> dict[SessionId, Array]:
        ended = [row for row in step.all_rows if _is_last(row, rows[row.session])]
        started_s = time.perf_counter()
        output = self._shard.run(
            step,
            [_take(row, rows[row.session]) for row in step.all_rows],
            [GREEDY if row in ended else None for row in step.all_rows],
        )
        self._batcher.finish(step, time.perf_counter() - started_s)
        assert output.sampled is not None
        ids = output.sampled.ids
        return {row.session: ids[i : i + 1] for i, row in enumerate(ended)}


def _take(row: StepRow, tokens: Tokens) -> Array:
    first = row.position - tokens.position
    return tokens.ids[first : first + row.tokens]


def _is_last(row: StepRow, tokens: Tokens) -> bool:
    return row.end == tokens.position + len(tokens.ids)
