"""Runs shards one after another, as the network does, for the engine's tests."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax
import numpy as np

from pals.engine.batch import RowKind, Step, StepRow
from pals.engine.buckets import BatchLimits, Buckets
from pals.engine.shard import Shard
from pals.engine.work import RowSampling
from pals.models.snapshot import Snapshot
from pals.types import (
    DEFAULT_QUANTIZATION,
    Dtype,
    EngineLimits,
    LayerRange,
    Quantization,
    Sampling,
    SessionId,
)

LIMITS = EngineLimits(
    max_sessions=3, max_rows=4, max_context_tokens=300, max_chunk_tokens=32, verify_tokens=4
)
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def load_chain(
    snapshot: Snapshot,
    cuts: Sequence[int],
    dtype: Dtype = "f32",
    limits: EngineLimits = LIMITS,
    quantization: Quantization = DEFAULT_QUANTIZATION,
) -> list[Shard]:
    """Load one shard for each range between the cuts, which start at 0."""
    ends = [*cuts[1:], snapshot.config.num_layers]
    ranges = [LayerRange(start, stop) for start, stop in zip(cuts, ends, strict=True)]
    return [
        Shard.load(snapshot, layers, dtype=dtype, limits=limits, quantization=quantization)
        for layers in ranges
    ]


def pages_of(shard: Shard, slot: int, end: int) -> array[int]:
    """Return the page table of a session that has ``end`` tokens in the ``slot``-th place."""
    limits = BatchLimits.of(shard.limits)
    first = 1 + slot * limits.max_pages
    return array("i", range(first, first + limits.pages_of(end)))


def make_step(shard: Shard, rows: Sequence[StepRow], chunk: StepRow | None = None) -> Step:
    """Return a step of some rows, on the least of the shard's programs."""
    buckets = Buckets(BatchLimits.of(shard.limits))
    chunk_tokens = 0 if chunk is None else chunk.tokens
    most = max((row.tokens for row in rows), default=1)
    program = buckets.choose(
        len(rows), 1 if most == 1 else shard.limits.verify_tokens, chunk_tokens, 1
    )
    assert program is not None
    return Step(program=program, rows=tuple(rows), chunk=chunk, copies=())


def make_row(shard: Shard, slot: int, kind: RowKind, position: int, tokens: int) -> StepRow:
    """Return a row of the session in the ``slot``-th place."""
    return StepRow(
        session=SessionId(slot.to_bytes(16, "big")),
        kind=kind,
        position=position,
        tokens=tokens,
        pages=pages_of(shard, slot, position + tokens),
    )


def run_rows(
    chain: list[Shard],
    rows: Sequence[tuple[int, RowKind, int, Sequence[int]]],
    samplings: Sequence[Sampling | None],
) -> list[list[int]]:
    """Run rows (slot, kind, position, token ids) as one step through the chain.

    Returns:
        What the tail sampled for each row; nothing for those without sampling.
    """
    inputs = [np.array(tokens, np.int32) for *_, tokens in rows]
    for shard in chain:
        made = [make_row(shard, s, k, p, len(tokens)) for s, k, p, tokens in rows]
        chunk = made[-1] if rows[-1][1] == "prefill" else None
        step = make_step(shard, made if chunk is None else made[:-1], chunk)
        chosen = [None if s is None or not shard.is_tail else RowSampling(s, 0) for s in samplings]
        output = shard.run(step, inputs, chosen)
        if output.hidden is not None:
            ends = np.cumsum([row.tokens for row in made])[:-1]
            inputs = np.split(output.hidden, ends)
    assert output.sampled is not None
    counts = [
        0 if sampling is None else (1 if kind == "prefill" else len(tokens))
        for (_, kind, _, tokens), sampling in zip(rows, samplings, strict=True)
    ]
    return [part.tolist() for part in np.split(output.sampled.ids, np.cumsum(counts)[:-1])]


def prefill(
    chain: list[Shard],
    slot: int,
    prompt: Sequence[int],
    *,
    position: int = 0,
    chunk: int = 32,
    sampling: Sampling | None = None,
) -> int:
    """Prefill a prompt in chunks; returns the first sampled token."""
    sampled: list[int] = []
    for start in range(0, len(prompt), chunk):
        last = start + chunk >= len(prompt)
        row = (slot, "prefill", position + start, prompt[start : start + chunk])
        (sampled,) = run_rows(chain, [row], [(sampling or Sampling()) if last else None])
    (token,) = sampled
    return token


def hidden_states(shard: Shard, prompt: Sequence[int], *, chunk: int = 32) -> np.ndarray:
    """Return the hidden states [T, D] that a head makes of a prompt."""
    parts: list[np.ndarray] = []
    for start in range(0, len(prompt), chunk):
        ids = np.array(prompt[start : start + chunk], np.int32)
        row = make_row(shard, 0, "prefill", start, len(ids))
        hidden = shard.run(make_step(shard, [], row), [ids], [None]).hidden
        assert hidden is not None
        parts.append(hidden)
    return np.concatenate(parts)


def decode(
    chain: list[Shard],
    slots: Sequence[int],
    positions: Sequence[int],
    tokens: Sequence[int],
    samplings: Sequence[Sampling] | None = None,
) -> list[int]:
    """Run one decode step of a batch through the chain; returns the next tokens."""
    rows = [(s, "decode", p, [t]) for s, p, t in zip(slots, positions, tokens, strict=True)]
    return [token for (token,) in run_rows(chain, rows, samplings or [Sampling()] * len(slots))]


def generate(
    chain: list[Shard],
    prompt: Sequence[int],
    *,
    slot: int = 0,
    count: int = 12,
    chunk: int = 32,
    sampling: Sampling | None = None,
) -> list[int]:
    """Generate ``count`` tokens of one session alone."""
    tokens = [prefill(chain, slot, prompt, chunk=chunk, sampling=sampling)]
    for position in range(len(prompt), len(prompt) + count - 1):
        samplings = [sampling or Sampling()]
        tokens += decode(chain, [slot], [position], tokens[-1:], samplings)
    return tokens


@contextmanager
def counting_compilations() -> Iterator[list[str]]:
    """Collect an event for each program that XLA compiles or takes from its cache."""
    events: list[str] = []

    def listen(event: str, duration: float, **_: object) -> None:
        del duration
        if event == COMPILE_EVENT:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
