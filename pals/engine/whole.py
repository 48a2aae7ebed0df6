"""Steps of one program for all layers of a shard, as accelerators want them."""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
# (jax and flax annotate their functions with types that pyright sees as partially unknown)

from __future__ import annotations

from functools import partial

import jax
from jax.sharding import Mesh, PartitionSpec

from pals.engine.bank import Bank
from pals.engine.compilation import CompilerOptions, workspace_bytes
from pals.engine.stepping import Leaves, Run, StepArguments, StepOutcome, pool_chunk, sample_step
from pals.engine.work import Sampled
from pals.models.build import AbstractModel
from pals.models.decoder import Cache, Decoder
from pals.models.paged import StepShape, Tables
from pals.models.spread import places_of, run_apart


class WholeSteps:
    """Compiles all layers together; implements `pals.engine.stepping.StepBuilder`.

    Args:
        model: Of the shard.
        mesh: The devices that it is spread over; None for a single one.
    """

    def __init__(self, model: AbstractModel[Decoder], mesh: Mesh | None = None) -> None:
        self._model = model
        self._mesh = mesh

    def compile(
        self, arguments: StepArguments, shape: StepShape, options: CompilerOptions | None
    ) -> tuple[Run, int]:
        """Compile a step of such arguments; see `StepBuilder`."""
        compiled = self.lower(arguments, shape).compile(options)

        def run(arguments: StepArguments) -> StepOutcome:
            return StepOutcome(*compiled(*arguments))

        return run, workspace_bytes(compiled)

    def lower(self, arguments: StepArguments, shape: StepShape) -> jax.stages.Lowered:
        """Trace a step of such arguments."""
        return self.step(arguments, shape).lower(*arguments)

    def step(self, arguments: StepArguments, shape: StepShape) -> jax.stages.Wrapped:
        """Return the step of such arguments, which nothing has traced yet."""
        places = places_of(arguments)
        results = PartitionSpec(), places.cache, places.bank, PartitionSpec()
        run = run_apart(partial(self._run_step, shape), self._mesh, tuple(places), results)
        # Plain flat tuples cross the jit boundary: flattening modules takes milliseconds.
        return jax.jit(run, donate_argnums=(1, 2))

    def _run_step(
        self,
        shape: StepShape,
        leaves: Leaves,
        cache: Cache,
        bank: Bank | None,
        inputs: jax.Array,
        tables: Tables,
        sampling: jax.Array | None,
    ) -> tuple[jax.Array | Sampled, Cache, Bank | None, jax.Array | None]:
        model = self._model.merge(leaves)
        x, cache = model(inputs, cache, shape, tables)
        if sampling is None:
            return x, cache, bank, None
        assert bank is not None
        sampled, bank = sample_step(model, bank, x, tables, sampling, shape)
        return sampled, cache, bank, pool_chunk(model, x, tables, shape)
