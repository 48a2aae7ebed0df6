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

from pals import config
from pals.engine.local import LocalChain
from pals.models.hub import resolve_model
from pals.text.template import ChatTemplate
from pals.text.tokenizer import Tokenizer
from pals.types import EngineLimits, LayerRange

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

    chain = LocalChain([load_whole_model(job.model)])
    prompt = encode_prompt(resolve_model(job.model).path, job.prompt)
    _write(Ready(device=jax.default_backend()))
    for _ in sys.stdin:
        _write(answer(chain, prompt, job.max_tokens))


def load_whole_model(model: str) -> Shard:
    """Return all layers of a model as one warm shard for one session.

    Raises:
        ModelError: The model cannot be found or loaded.
    """
    from pals.engine.shard import Shard

    settings = config.load_settings().shard
    layers = LayerRange(0, resolve_model(model).config.num_layers)
    limits = EngineLimits(max_sessions=1, max_rows=2, max_context_tokens=2048, max_chunk_tokens=256)
    snapshot = resolve_model(model, layers)
    shard = Shard.load(snapshot, layers, dtype=settings.dtype, limits=limits)
    shard.warmup()
    return shard


def encode_prompt(folder: Path, prompt: str) -> list[int]:
    """Return the ids that `pals serve` makes of one user message."""
    text = ChatTemplate.load(folder).render([{"role": "user", "content": prompt}])
    return Tokenizer.load(folder).encode(text, add_special_tokens=False)


def answer(chain: LocalChain, prompt: list[int], max_tokens: int) -> Timing:
    """Generate exactly ``max_tokens`` tokens greedily and return how long it took."""
    started_s = time.perf_counter()
    tokens = chain.generate(prompt, max_new_tokens=max_tokens)
    next(tokens)
    first_s = time.perf_counter()
    others = sum(1 for _ in tokens)
    return Timing(
        time_to_first_token_s=first_s - started_s,
        tokens_per_s=others / (time.perf_counter() - first_s),
    )


def _write(document: Ready | Timing) -> None:
    print(msgspec.json.encode(document).decode(), flush=True)


if __name__ == "__main__":
    main()
