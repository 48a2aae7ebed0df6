"""The compiled programs of a shard: steps over rows of many sessions, and copies of pages.

Rows are padded to a few sizes, and each size is compiled once, before it is served.
"""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
# (jax and flax annotate their functions with types that pyright sees as partially unknown)

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.stages import Compiled

from pals.engine.bank import abstract_bank
from pals.engine.buckets import BatchLimits, Program, plan_programs
from pals.engine.cache import AbstractCache, abstract_cache
from pals.engine.compilation import CODE_UNOPTIMISED, compiler_options, workspace_bytes
from pals.engine.layered import LayeredSteps
from pals.engine.sampler import abstract_rows
from pals.engine.stepping import Run, StepArguments, StepBuilder, sampled_rows, step_shape
from pals.engine.whole import WholeSteps
from pals.models.build import AbstractModel, Parameters
from pals.models.config import ModelConfig
from pals.models.decoder import Cache
from pals.models.numerics import Numerics
from pals.models.paged import Tables
from pals.models.spread import places_of, run_apart
from pals.types import EngineLimits, LayerRange

COMPILERS = 2
"""Programs that are compiled at one time; for each, XLA has threads of its own."""

COPIES = 16
"""Pages that one call copies; a step that needs more calls again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledProgram:
    """What one program took to compile, or to come from the cache on disk.

    Attributes:
        name: Says what it holds.
        program: Its sizes; None for what is no step.
        seconds: Until it could run.
        run_s: Of its first run, with what XLA plans then.
        workspace_bytes: Temporaries on each device.
    """

    name: str
    program: Program | None
    seconds: float
    run_s: float = 0.0
    workspace_bytes: int


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
        model = AbstractModel.build(config, layers, numerics)
        self.parameters: Parameters = model.parameters
        self.all: tuple[Program, ...] = plan_programs(BatchLimits.of(limits))
        self.cache: AbstractCache = abstract_cache(
            config,
            layers,
            num_pages=num_pages,
            page_tokens=limits.page_tokens,
            dtype=numerics.compute,
            platform=numerics.platform,
            mesh=numerics.mesh,
        )
        self._config = config
        self._dtype = numerics.compute
        self._mesh = numerics.mesh
        self._options = compiler_options(numerics.platform)
        self._first = len(self.all) * layers.start // config.num_layers
        self._is_head = layers.start == 0
        self._is_tail = layers.stop == config.num_layers
        self._steps: StepBuilder = (
            LayeredSteps(config, layers, numerics, model)
            if numerics.platform == "cpu" and numerics.mesh is None
            else WholeSteps(model, numerics.mesh)
        )
        places, whole = places_of(self.cache), PartitionSpec()
        copy = run_apart(copy_pages, self._mesh, (places, whole, whole), places)
        self._copy = jax.jit(copy, donate_argnums=0)
        self._compiled: dict[Program, Run] = {}
        self._compiled_copy: Compiled | None = None

    def get(self, program: Program) -> Run:
        """Return a program, compiling it when it was not warmed up."""
        if program not in self._compiled:
            self.compile(program)
        return self._compiled[program]

    def get_copy(self) -> Compiled:
        """Return what copies `COPIES` pages."""
        if self._compiled_copy is None:
            self.compile_copy()
        assert self._compiled_copy is not None
        return self._compiled_copy

    def compile(self, program: Program) -> CompiledProgram:
        """Compile one program."""
        started = time.perf_counter()
        self._compiled[program], workspace = self._steps.compile(
            self._arguments(program), step_shape(program), self._options
        )
        return CompiledProgram(
            name=str(program),
            program=program,
            seconds=time.perf_counter() - started,
            workspace_bytes=workspace,
        )

    def compile_all(self) -> Iterator[tuple[Program, CompiledProgram]]:
        """Compile every program, some at a time; yields each in its turn.

        Shards of a model that start together on one machine begin with different ones: layers
        of one kind are the same program, which the others then find in the cache on disk.

        Tracing holds Python's lock; XLA holds none while it compiles, reads what was compiled,
        or computes.
        """
        pool = ThreadPoolExecutor(COMPILERS, "pals-compile")
        try:
            order = (*self.all[self._first :], *self.all[: self._first])
            building = [(program, pool.submit(self.compile, program)) for program in order]
            for program, built in building:
                yield program, built.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def compile_copy(self) -> CompiledProgram:
        """Compile what copies pages."""
        started = time.perf_counter()
        ids = jax.ShapeDtypeStruct((COPIES,), jnp.int32)
        compiled = self._copy.lower(self.cache, ids, ids).compile(self._options)
        self._compiled_copy = compiled
        return CompiledProgram(
            name=f"copy_{COPIES}",
            program=None,
            seconds=time.perf_counter() - started,
            workspace_bytes=workspace_bytes(compiled),
        )

    def workspace_bytes(self, program: Program) -> int:
        """Return the temporary bytes of a program on each device, without weights or cache.

        The program is compiled of shapes only and thrown away. Buffers are assigned before
        machine code is made, so on CPU no time goes into optimising that code.
        """
        options = self._options and self._options | CODE_UNOPTIMISED
        shape = step_shape(program)
        return self._steps.compile(self._arguments(program), shape, options)[1]

    def _arguments(self, program: Program) -> StepArguments:
        shape = step_shape(program)
        tokens: tuple[int, ...] = (shape.tokens,)
        if not self._is_head:
            tokens = (*tokens, self._config.hidden_size)
        return StepArguments(
            leaves=tuple(self.parameters.values()),
            cache=self.cache,
            bank=abstract_bank(self._config.vocab_size, mesh=self._mesh) if self._is_tail else None,
            inputs=jax.ShapeDtypeStruct(tokens, jnp.int32 if self._is_head else self._dtype),
            tables=_abstract_tables(program),
            sampling=abstract_rows(sampled_rows(shape)) if self._is_tail else None,
        )


def copy_pages(cache: Cache, sources: jax.Array, targets: jax.Array) -> Cache:
    """Copy pages of every layer; pairs that only pad copy the scratch page to itself."""

    def copy(number: jax.Array, arrays: Cache) -> Cache:
        def copy_page(array: jax.Array) -> jax.Array:
            page = jax.lax.dynamic_index_in_dim(array, sources[number], axis=1)
            return jax.lax.dynamic_update_index_in_dim(array, page, targets[number], axis=1)

        return jax.tree.map(copy_page, arrays)

    copied: Cache = jax.lax.fori_loop(0, COPIES, copy, cache)
    return copied


def _abstract_tables(program: Program) -> Tables:
    batch = step_shape(program).batch
    column = jax.ShapeDtypeStruct((batch,), jnp.int32)
    pages = jax.ShapeDtypeStruct((batch, program.pages), jnp.int32)
    # Lowering looks at shapes only.
    return Tables(column, column, pages)  # pyright: ignore[reportArgumentType]
