"""The whole model in one process without a network: what a chain of shards is held against.

Run as a process of its own, since threads and huge pages are set before one starts. Takes
a `Job` as JSON in its one argument and prints a `Report` as JSON.
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
    """What to measure: the same request several times, the first one as a warm-up."""

    model: str
    prompt: str
    max_tokens: int
    requests: int
    threads: int


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """How fast one answer came."""

    time_to_first_token_s: float
    tokens_per_s: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The timings of all requests but the first."""

    device: str
    timings: list[Timing]


def main() -> None:
    """Run the job of the command line."""
    job = msgspec.json.decode(sys.argv[1], type=Job)
    config.limit_compute_threads(job.threads)
    report = run(job)
    print(msgspec.json.encode(report).decode())


def run(job: Job) -> Report:
    """Load the model and answer the job's request again and again.

    Raises:
        ModelError: The model cannot be found or loaded.
    """
    # Only a process that computes pays for importing jax.
    import jax

    from pals.engine.shard import Shard

    settings = config.load_settings().shard
    snapshot = resolve_model(job.model)
    whole = LayerRange(0, snapshot.config.num_layers)
    limits = EngineLimits(
        max_sessions=settings.max_sessions,
        max_context_tokens=settings.max_context_tokens,
        max_chunk_tokens=settings.max_chunk_tokens,
    )
    shard = Shard.load(resolve_model(job.model, whole), whole, dtype=settings.dtype, limits=limits)
    prompt = encode_prompt(snapshot.path, job.prompt)
    timings = [_answer(shard, prompt, job.max_tokens) for _ in range(job.requests)]
    return Report(device=jax.default_backend(), timings=timings[1:])


def encode_prompt(folder: Path, prompt: str) -> list[int]:
    """Return the ids that `pals serve` makes of one user message."""
    text = ChatTemplate.load(folder).render([{"role": "user", "content": prompt}])
    return Tokenizer.load(folder).encode(text, add_special_tokens=False)


def _answer(shard: Shard, prompt: list[int], max_tokens: int) -> Timing:
    started_s = time.perf_counter()
    sampling = Sampling()
    chunk = shard.limits.max_chunk_tokens
    output = np.empty(0, np.int32)
    for start in range(0, len(prompt), chunk):
        part = np.array(prompt[start : start + chunk], np.int32)
        last = start + chunk >= len(prompt)
        output = shard.prefill(
            slot=0, position=start, inputs=part, sampling=sampling if last else None
        )
    first_s = time.perf_counter()
    for position in range(len(prompt), len(prompt) + max_tokens - 1):
        output = shard.decode(slots=[0], positions=[position], inputs=output, samplings=[sampling])
    return Timing(
        time_to_first_token_s=first_s - started_s,
        tokens_per_s=(max_tokens - 1) / (time.perf_counter() - first_s),
    )


if __name__ == "__main__":
    main()
