"""Runs shards one after another, as the network does, for the engine's tests."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax
import numpy as np

from pals.engine.shard import Shard
from pals.models.snapshot import Snapshot
from pals.types import (
    DEFAULT_QUANTIZATION,
    Dtype,
    EngineLimits,
    LayerRange,
    Quantization,
    Sampling,
)

LIMITS = EngineLimits(max_sessions=3, max_context_tokens=300, max_chunk_tokens=32)
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
    token = np.zeros(0, np.int32)
    for start in range(0, len(prompt), chunk):
        x = np.array(prompt[start : start + chunk], np.int32)
        last = start + chunk >= len(prompt)
        for shard in chain:
            x = shard.prefill(
                slot=slot,
                position=position + start,
                inputs=x,
                sampling=(sampling or Sampling()) if last else None,
            )
        assert x.shape == ((1,) if last else (0,))
        token = x
    return int(token[0])


def decode(
    chain: list[Shard],
    slots: Sequence[int],
    positions: Sequence[int],
    tokens: Sequence[int],
    samplings: Sequence[Sampling] | None = None,
) -> list[int]:
    """Run one decode step of a batch through the chain; returns the next tokens."""
    x = np.array(tokens, np.int32)
    for shard in chain:
        x = shard.decode(
            slots=slots,
            positions=positions,
            inputs=x,
            samplings=samplings or [Sampling()] * len(slots),
        )
    return x.tolist()


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
