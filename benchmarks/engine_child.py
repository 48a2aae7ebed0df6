"""A whole model as one shard, without a network; steps are planned and run as in `pals shard`."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from benchmarks.engine_job import (
    MAX_ROWS,
    PREFILL_TOKENS,
    PROMPT_TOKENS,
    SHAPES,
    WARMUP_STEPS,
    Ask,
    Job,
    Ready,
    Took,
)
from benchmarks.line_child import serve
from benchmarks.local_engine import LocalEngine, Tokens
from benchmarks.random_models import FOLDER, Shape, open_checkpoint
from pals import config
from pals.engine.batch import BatchRules
from pals.types import EngineLimits, LayerRange, SessionId

if TYPE_CHECKING:
    from pals.engine.shard import Shard

CONTEXT = 1024
KV_BYTES = 1 << 30


class Engine:
    """Sessions that go back to their prompt after each sample."""

    def __init__(self, shard: Shard, vocab_size: int) -> None:
        # Nobody is waited for: a prompt that is measured runs as if it were alone.
        self._engine = LocalEngine(shard, BatchRules(decoding_s=0.0))
        self._vocab_size = vocab_size
        self._prompt = self._open(PREFILL_TOKENS)
        self._sessions = [self._open(PROMPT_TOKENS) for _ in range(MAX_ROWS)]
        for session in self._sessions:
            self._engine.run({session: self._tokens(0, PROMPT_TOKENS)})

    def decode(self, rows: int, steps: int) -> float:
        """Return the seconds of a step of ``rows`` sessions."""
        started_s = 0.0
        for number in range(WARMUP_STEPS + steps):
            if number == WARMUP_STEPS:
                started_s = time.perf_counter()
            tokens = self._tokens(PROMPT_TOKENS + number, 1)
            self._engine.run(dict.fromkeys(self._sessions[:rows], tokens))
        return (time.perf_counter() - started_s) / steps

    def prefill(self) -> float:
        """Return the seconds until a prompt's first token."""
        tokens = self._tokens(0, PREFILL_TOKENS)
        started_s = time.perf_counter()
        self._engine.run({self._prompt: tokens})
        return time.perf_counter() - started_s

    def _open(self, prompt_tokens: int) -> SessionId:
        return self._engine.open(prompt_tokens=prompt_tokens, max_tokens=CONTEXT)

    def _tokens(self, position: int, count: int) -> Tokens:
        ids = np.arange(position, position + count, dtype=np.int32) % self._vocab_size
        return Tokens(position, ids)


def load(shape: Shape, job: Job) -> Shard:
    """Load all layers; what int8 makes of a checkpoint is kept for the next run."""
    from pals.engine.shard import Shard

    limits = EngineLimits(
        max_sessions=MAX_ROWS + 1,
        max_rows=MAX_ROWS,
        max_context_tokens=CONTEXT,
        max_chunk_tokens=PREFILL_TOKENS,
        verify_tokens=1,
        kv_bytes=KV_BYTES,
    )
    layers = LayerRange(0, shape.num_layers)
    shard = Shard.load(open_checkpoint(shape), layers, dtype=job.dtype, limits=limits)
    shard.warmup()
    return shard


def main() -> None:
    """Answer the questions of standard input."""
    job = msgspec.json.decode(sys.argv[1], type=Job)
    config.limit_compute_threads(job.threads)
    # Only a process that computes pays for importing jax, after its threads are set.
    import jax

    shape = SHAPES[job.shape]
    shard = load(shape, job)
    engine = Engine(shard, shape.vocab_size)
    ready = Ready(device=jax.devices()[0].device_kind, weight_bytes=shard.memory_bytes().weights)

    def answer(ask: Ask) -> Ready | Took:
        match ask.kind:
            case "load":
                return ready
            case "decode":
                return Took(seconds=engine.decode(ask.rows, ask.steps))
            case "prefill":
                return Took(seconds=engine.prefill())

    serve(Ask, answer)


CACHE = {config.CACHE_DIR_VARIABLE: str(FOLDER / "cache")}
"""Where compiled programs and prepared weights are kept."""


if __name__ == "__main__":
    main()
