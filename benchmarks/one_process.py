"""The whole model in one process without a network: what a chain of shards is held against.

A process of its own, since threads and huge pages are set before one starts. It takes a
`Job` as JSON in its one argument, says on standard output when it is `Ready`, and then
answers each line on standard input with the `Timing` of one more answer.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from pals import config
from pals.models.hub import resolve_model
from pals.text.template import ChatTemplate
from pals.text.tokenizer import Tokenizer
from pals.types import EngineLimits, LayerRange, Sampling

if TYPE_CHECKING:
    from pals.engine.shard import Shard


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What to answer, always the same, and with how many compute threads."""

    model: str
    prompt: str
    max_tokens: int
    threads: int


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """The model is loaded on this kind of device."""

    device: str


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """How fast one answer came."""

    time_to_first_token_s: float
    tokens_per_s: float


def main() -> None:
    """Serve the job of the command line until standard input ends."""
    job = msgspec.json.decode(sys.argv[1], type=Job)
    config.limit_compute_threads(job.threads)
    # Only a process that computes pays for importing jax.
    import jax

    shard = load_whole_model(job.model)
    prompt = encode_prompt(resolve_model(job.model).path, job.prompt)
    _write(Ready(device=jax.default_backend()))
    for _ in sys.stdin:
        _write(answer(shard, prompt, job.max_tokens))


def load_whole_model(model: str) -> Shard:
    """Return all layers of a model as one shard, with the limits of a shard by default.

    Raises:
        ModelError: The model cannot be found or loaded.
    """
    from pals.engine.shard import Shard

    settings = config.load_settings().shard
    layers = LayerRange(0, resolve_model(model).config.num_layers)
    limits = EngineLimits(
        max_sessions=settings.max_sessions,
        max_context_tokens=settings.max_context_tokens,
        max_chunk_tokens=settings.max_chunk_tokens,
    )
    return Shard.load(resolve_model(model, layers), layers, dtype=settings.dtype, limits=limits)


def encode_prompt(folder: Path, prompt: str) -> list[int]:
    """Return the ids that `pals serve` makes of one user message."""
    text = ChatTemplate.load(folder).render([{"role": "user", "content": prompt}])
    return Tokenizer.load(folder).encode(text, add_special_tokens=False)


def answer(shard: Shard, prompt: list[int], max_tokens: int) -> Timing:
    """Generate exactly ``max_tokens`` tokens greedily and return how long it took."""
    started_s = time.perf_counter()
    output = np.empty(0, np.int32)
    chunk = shard.limits.max_chunk_tokens
    for start in range(0, len(prompt), chunk):
        part = np.array(prompt[start : start + chunk], np.int32)
        sampling = Sampling() if start + chunk >= len(prompt) else None
        output = shard.prefill(slot=0, position=start, inputs=part, sampling=sampling)
    first_s = time.perf_counter()
    for position in range(len(prompt), len(prompt) + max_tokens - 1):
        output = shard.decode(
            slots=[0], positions=[position], inputs=output, samplings=[Sampling()]
        )
    return Timing(
        time_to_first_token_s=first_s - started_s,
        tokens_per_s=(max_tokens - 1) / (time.perf_counter() - first_s),
    )


def _write(document: Ready | Timing) -> None:
    print(msgspec.json.encode(document).decode(), flush=True)


if __name__ == "__main__":
    main()
