"""The compiled programs of a shard: steps over rows of many sessions, and copies of pages.

Rows are padded to a few sizes, and each size is compiled once, before it is served.
"""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
# (jax and flax annotate their functions with types that pyright sees as partially unknown)

from __future__ import annotations

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.stages import Compiled

from pals.engine.bank import Bank, abstract_bank
from pals.engine.buckets import BatchLimits, Program, plan_programs
from pals.engine.cache import AbstractCache, abstract_cache
from pals.engine.compilation import CODE_UNOPTIMISED, compiler_options
from pals.engine.sampler import abstract_rows, sample
from pals.engine.work import Sampled
from pals.models.build import AbstractModel, Parameters
from pals.models.config import ModelConfig
from pals.models.decoder import Cache
from pals.models.numerics import Numerics
from pals.models.paged import StepShape, Tables
from pals.types import EngineLimits, LayerRange

COPIES = 16
"""Pages that one call copies; a step that needs more calls again."""

Leaves = tuple[jax.Array, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledProgram:
    """What one program took to compile, or to come from the cache on disk.

    Attributes:
        name: Says what it holds.
        program: Its sizes; None for what is no step.
        seconds: Until it could run.
        run_s: Of its first run, where it has been run; of the second where that is short.
        workspace_bytes: Temporaries on the device.
    """

    name: str
    program: Program | None
    seconds: float
    run_s: float = 0.0
    workspace_bytes: int


def step_shape(program: Program) -> StepShape:
    """Return how a program divides its tokens into rows."""
    return StepShape(program.rows, program.row_tokens, program.chunk_tokens)


class Programs:
    """Builds and keeps the compiled programs of one shard.

    Args:
        config: Of the model.
        layers: Of the shard.
        numerics: In which numbers it computes.
        limits: What it is compiled for.
        num_pages: Of its cache, the scratch page included.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: LayerRange,
        *,
        numerics: Numerics,
        limits: EngineLimits,
        num_pages: int,
    ) -> None:
        self._config = config
        self._dtype = numerics.compute
        self._options = compiler_options(numerics.platform)
        self._is_head = layers.start == 0
        self._is_tail = layers.stop == config.num_layers
        self._model = AbstractModel.build(config, layers, numerics)
        self.all: tuple[Program, ...] = plan_programs(BatchLimits.of(limits))
        self.cache: AbstractCache = abstract_cache(
            config, layers, num_pages=num_pages, page_tokens=limits.page_tokens, dtype=self._dtype
        )
        # Plain flat tuples cross the jit boundary: flattening modules takes milliseconds.
        self._step = jax.jit(
            self._run_step, static_argnames="shape", donate_argnames=("cache", "bank")
        )
        self._copy = jax.jit(copy_pages, donate_argnames="cache")
        self._compiled: dict[Program, Compiled] = {}
        self._compiled_copy: Compiled | None = None

    @property
    def parameters(self) -> Parameters:
        """Shape and dtype of each of the leaves that the programs take."""
        return self._model.parameters

    def get(self, program: Program, leaves: Leaves, cache: Cache) -> Compiled:
        """Return a program, compiling it when it was not warmed up."""
        if program not in self._compiled:
            self.compile(program, leaves, cache)
        return self._compiled[program]

    def get_copy(self, cache: Cache) -> Compiled:
        """Return what copies `COPIES` pages."""
        if self._compiled_copy is None:
            self.compile_copy(cache)
        assert self._compiled_copy is not None
        return self._compiled_copy

    def compile(self, program: Program, leaves: Leaves, cache: Cache) -> CompiledProgram:
        """Compile one program; ``leaves`` and ``cache`` are looked at, not used up."""
        started = time.perf_counter()
        compiled = self._lower(program, leaves, cache).compile(self._options)
        self._compiled[program] = compiled
        return _describe(str(program), program, compiled, started)

    def compile_copy(self, cache: Cache) -> CompiledProgram:
        """Compile what copies pages."""
        started = time.perf_counter()
        ids = jax.ShapeDtypeStruct((COPIES,), jnp.int32)
        compiled = self._copy.lower(cache, ids, ids).compile(self._options)
        self._compiled_copy = compiled
        return _describe(f"copy_{COPIES}", None, compiled, started)

    def workspace_bytes(self, program: Program) -> int:
        """Return the temporary device bytes of a program, without weights or cache.

        The program is compiled of shapes only and thrown away. Buffers are assigned before
        machine code is made, so on CPU no time goes into optimising that code.
        """
        lowered = self._lower(program, tuple(self.parameters.values()), self.cache)
        compiled = lowered.compile(self._options and self._options | CODE_UNOPTIMISED)
        return _workspace_bytes(compiled)

    def _lower(
        self,
        program: Program,
        leaves: tuple[jax.Array | jax.ShapeDtypeStruct, ...],
        cache: Cache | AbstractCache,
    ) -> jax.stages.Lowered:
        shape = step_shape(program)
        return self._step.lower(
            leaves,
            cache,
            abstract_bank(self._config.vocab_size) if self._is_tail else None,
            self._abstract_inputs(shape.tokens),
            _abstract_tables(program),
            abstract_rows(sampled_rows(shape)) if self._is_tail else None,
            shape=shape,
        )

    def _abstract_inputs(self, tokens: int) -> jax.ShapeDtypeStruct:
        if self._is_head:
            return jax.ShapeDtypeStruct((tokens,), jnp.int32)
        return jax.ShapeDtypeStruct((tokens, self._config.hidden_size), self._dtype)

    def _run_step(
        self,
        leaves: Leaves,
        cache: Cache,
        bank: Bank | None,
        inputs: jax.Array,
        tables: Tables,
        sampling: jax.Array | None,
        *,
        shape: StepShape,
    ) -> tuple[jax.Array | Sampled, Cache, Bank | None]:
        """Run one padded step; returns hidden states [M, D], or at the tail what it sampled."""
        model = self._model.merge(leaves)
        x, cache = model(inputs, cache, shape, tables)
        if sampling is None:
            return x, cache, bank
        assert bank is not None
        sampled, bank = sample(
            model.forward_logits(take_sampled(x, shape, tables)),
            sampling,
            sampled_positions(shape, tables),
            bank,
        )
        return sampled, cache, bank


def sampled_rows(shape: StepShape) -> int:
    """Return how many tokens the tail samples in a step, S: all but those within a chunk."""
    return shape.short_tokens + bool(shape.chunk_tokens)


def take_sampled(x: jax.Array, shape: StepShape, tables: Tables) -> jax.Array:
    """Return of [M, D] each token of short rows and the last one of the chunk, [S, D]."""
    short = x[: shape.short_tokens]
    if not shape.chunk_tokens:
        return short
    last = shape.short_tokens + jnp.maximum(tables.lengths[-1] - 1, 0)
    return jnp.concatenate([short, jax.lax.dynamic_slice_in_dim(x, last, 1)])


def sampled_positions(shape: StepShape, tables: Tables) -> jax.Array:
    """Return where the sampled tokens will stand, [S] int32."""
    offsets = jnp.arange(1, shape.row_tokens + 1, dtype=jnp.int32)
    short = (tables.starts[: shape.rows, None] + offsets).reshape(-1)
    if not shape.chunk_tokens:
        return short
    return jnp.concatenate([short, tables.starts[-1:] + tables.lengths[-1:]])


def copy_pages(cache: Cache, sources: jax.Array, targets: jax.Array) -> Cache:
    """Copy pages of every layer; pairs that only pad copy the scratch page to itself."""

    def copy(number: jax.Array, arrays: Cache) -> Cache:
        return jax.tree.map(
            lambda array: jax.lax.dynamic_update_index_in_dim(
                array,
                jax.lax.dynamic_index_in_dim(array, sources[number], axis=1, keepdims=False),
                targets[number],
                axis=1,
            ),
            arrays,
        )

    copied: Cache = jax.lax.fori_loop(0, COPIES, copy, cache)
    return copied


def _abstract_tables(program: Program) -> Tables:
    batch = step_shape(program).batch
    column = jax.ShapeDtypeStruct((batch,), jnp.int32)
    pages = jax.ShapeDtypeStruct((batch, program.pages), jnp.int32)
    # Lowering looks at shapes only.
    return Tables(column, column, pages)  # pyright: ignore[reportArgumentType]


def _describe(
    name: str, program: Program | None, compiled: Compiled, started: float
) -> CompiledProgram:
    return CompiledProgram(
        name=name,
        program=program,
        seconds=time.perf_counter() - started,
        workspace_bytes=_workspace_bytes(compiled),
    )


def _workspace_bytes(compiled: Compiled) -> int:
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes if memory is not None else 0
