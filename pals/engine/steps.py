"""The compiled programs of a shard: prefill of one session, decode of many.

Inputs are padded to a few sizes, and each size is compiled once, before it is served.
"""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
# (jax and flax annotate their functions with types that pyright sees as partially unknown)

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from jax.stages import Compiled

from pals.config import PRIVATE_FOLDER
from pals.engine.cache import MIN_CHUNK_BUCKET, abstract_cache, cache_positions
from pals.engine.sampler import SamplingRows, sample
from pals.models.build import AbstractModel, Parameters
from pals.models.config import ModelConfig
from pals.models.decoder import Cache
from pals.models.numerics import Numerics
from pals.types import EngineLimits, LayerRange

MIN_CONTEXT_BUCKET = 256
CONTEXT_BUCKET_RATIO = 8

Leaves = tuple[jax.Array, ...]

CompilerOptions = dict[str, str | bool]

CPU_OPTIONS: CompilerOptions = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
"""By default XLA on CPU runs what depends on no input first: the widened int4 weights of all
layers would be held at one time. This order is as fast (decode) or faster (int4 prefill)."""

_CODE_UNOPTIMISED: CompilerOptions = {"xla_backend_optimization_level": "0"}


@dataclass(frozen=True, slots=True, order=True)
class ProgramKey:
    """What distinguishes the programs of one shard.

    Attributes:
        size: Tokens of a prefill chunk, or rows of a decode batch, padding included.
        context: Positions of the cache that attention reads.
    """

    kind: Literal["prefill", "decode"]
    size: int
    context: int

    def __str__(self) -> str:
        return f"{self.kind}_{self.size}x{self.context}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledProgram:
    """How long one program took to compile, or to come from the cache on disk."""

    name: str
    seconds: float
    workspace_bytes: int


def use_compilation_cache(folder: Path) -> None:
    """Keep every compiled program in ``folder``, however small or quick to compile."""
    folder.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
    # jax declares its options at run time, which pyright cannot see.
    current = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if current == os.fspath(folder):
        return
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # jax looks at the folder once, at the first compilation of the process.
    compilation_cache.reset_cache()


def chunk_buckets(limits: EngineLimits) -> list[int]:
    """Return the padded lengths of a prefill chunk: powers of two."""
    return _powers_of_two(MIN_CHUNK_BUCKET, limits.max_chunk_tokens)


def batch_buckets(limits: EngineLimits) -> list[int]:
    """Return the padded rows of a decode batch: powers of two."""
    return _powers_of_two(1, limits.max_sessions)


def context_buckets(limits: EngineLimits) -> list[int]:
    """Return how much of the cache attention may read: a short part, or all of it."""
    whole = cache_positions(limits)
    short = max(MIN_CONTEXT_BUCKET, limits.max_context_tokens // CONTEXT_BUCKET_RATIO)
    return [short, whole] if short < whole else [whole]


def smallest_bucket(buckets: list[int], size: int) -> int:
    """Return the first bucket that holds ``size``; callers have checked that one does."""
    return next(bucket for bucket in buckets if bucket >= size)


def _powers_of_two(first: int, most: int) -> list[int]:
    buckets = [first]
    while buckets[-1] < most:
        buckets.append(2 * buckets[-1])
    return buckets


class Programs:
    """Builds and keeps the compiled programs of one shard."""

    def __init__(
        self,
        config: ModelConfig,
        layers: LayerRange,
        *,
        numerics: Numerics,
        limits: EngineLimits,
    ) -> None:
        self._config = config
        self._layers = layers
        self._dtype = numerics.compute
        self._options = CPU_OPTIONS if numerics.platform == "cpu" else None
        self._limits = limits
        self._is_head = layers.start == 0
        self._is_tail = layers.stop == config.num_layers
        self._model = AbstractModel.build(config, layers, numerics)
        # Plain flat tuples cross the jit boundary: flattening modules takes milliseconds.
        self._steps = {
            "prefill": jax.jit(self._prefill, static_argnames="context", donate_argnames="cache"),
            "decode": jax.jit(self._decode, static_argnames="context", donate_argnames="cache"),
        }
        self._compiled: dict[ProgramKey, Compiled] = {}

    @property
    def parameters(self) -> Parameters:
        """Shape and dtype of each of the leaves that the programs take."""
        return self._model.parameters

    def all_keys(self) -> list[ProgramKey]:
        """Return every program that the limits allow."""
        contexts = context_buckets(self._limits)
        prefill = [
            ProgramKey("prefill", size, context)
            for size in chunk_buckets(self._limits)
            for context in contexts
            if size <= context
        ]
        decode = [
            ProgramKey("decode", size, context)
            for size in batch_buckets(self._limits)
            for context in contexts
        ]
        return prefill + decode

    def prefill_key(self, position: int, tokens: int) -> ProgramKey:
        size = smallest_bucket(chunk_buckets(self._limits), tokens)
        return ProgramKey("prefill", size, self._context(position + size))

    def decode_key(self, rows: int, last_position: int) -> ProgramKey:
        size = smallest_bucket(batch_buckets(self._limits), rows)
        return ProgramKey("decode", size, self._context(last_position + 1))

    def _context(self, positions: int) -> int:
        return smallest_bucket(context_buckets(self._limits), positions)

    def get(self, key: ProgramKey, leaves: Leaves, cache: Cache) -> Compiled:
        """Return a program, compiling it when it was not warmed up."""
        if key not in self._compiled:
            self.compile(key, leaves, cache)
        return self._compiled[key]

    def compile(self, key: ProgramKey, leaves: Leaves, cache: Cache) -> CompiledProgram:
        """Compile one program; ``leaves`` and ``cache`` are looked at, not used up."""
        started = time.perf_counter()
        arguments = self._abstract_arguments(key)
        lowered = self._steps[key.kind].lower(leaves, cache, *arguments, context=key.context)
        compiled = lowered.compile(self._options)
        self._compiled[key] = compiled
        memory = compiled.memory_analysis()
        return CompiledProgram(
            name=str(key),
            seconds=time.perf_counter() - started,
            workspace_bytes=memory.temp_size_in_bytes if memory is not None else 0,
        )

    def workspace_bytes(self, key: ProgramKey) -> int:
        """Return the temporary device bytes of a program, without weights or cache.

        The program is compiled of shapes only and thrown away. Buffers are assigned before
        machine code is made, so on CPU no time goes into optimising that code.
        """
        leaves = tuple(self.parameters.values())
        cache = abstract_cache(self._config, self._layers, limits=self._limits, dtype=self._dtype)
        arguments = self._abstract_arguments(key)
        lowered = self._steps[key.kind].lower(leaves, cache, *arguments, context=key.context)
        compiled = lowered.compile(self._options and self._options | _CODE_UNOPTIMISED)
        memory = compiled.memory_analysis()
        return memory.temp_size_in_bytes if memory is not None else 0

    def _abstract_arguments(self, key: ProgramKey) -> tuple[object, ...]:
        array = jax.ShapeDtypeStruct
        rows = 1 if key.kind == "prefill" else key.size
        row = array((rows,), jnp.int32)
        inputs = (
            array((key.size,), jnp.int32)
            if self._is_head
            else array((key.size, self._config.hidden_size), self._dtype)
        )
        sampling = SamplingRows(
            temperature=array((rows,), jnp.float32),
            top_p=array((rows,), jnp.float32),
            seeds=array((rows, 2), jnp.uint32),
        )
        lengths = (row,) if key.kind == "prefill" else ()
        return (inputs, row, row, *lengths, sampling if self._is_tail else None)

    def _prefill(
        self,
        leaves: Leaves,
        cache: Cache,
        inputs: jax.Array,
        slots: jax.Array,
        starts: jax.Array,
        lengths: jax.Array,
        sampling: SamplingRows[jax.Array] | None,
        *,
        context: int,
    ) -> tuple[jax.Array, Cache]:
        """Run one padded chunk; returns hidden states [T, D], or a token [1] at the tail."""
        model = self._model.merge(leaves)
        x, cache = model(
            inputs[None], cache, slots=slots, starts=starts, context=context, lengths=lengths
        )
        if sampling is None:
            return x[0], cache
        last = jax.lax.dynamic_slice_in_dim(x[0], lengths[0] - 1, 1)
        return sample(model.forward_logits(last), sampling, starts + lengths), cache

    def _decode(
        self,
        leaves: Leaves,
        cache: Cache,
        inputs: jax.Array,
        slots: jax.Array,
        starts: jax.Array,
        sampling: SamplingRows[jax.Array] | None,
        *,
        context: int,
    ) -> tuple[jax.Array, Cache]:
        """Run a padded batch; returns hidden states [B, D], or tokens [B] at the tail."""
        model = self._model.merge(leaves)
        # rows that only pad stand past the context, see `Shard.decode`
        lengths = (starts < self._limits.max_context_tokens).astype(jnp.int32)
        x, cache = model(
            inputs[:, None], cache, slots=slots, starts=starts, context=context, lengths=lengths
        )
        if sampling is None:
            return x[:, 0], cache
        return sample(model.forward_logits(x[:, 0]), sampling, starts + 1), cache
