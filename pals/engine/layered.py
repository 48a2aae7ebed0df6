"""Steps of one program for each kind of layer, called for one layer after another.

A shard of any length compiles in the time of one layer, and a program comes from the cache on
disk in as short a time. On CPU a call costs some 30 us more than the same layer inside a larger
program, of the milliseconds that it takes.
"""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false
# (jax and flax annotate their functions with types that pyright sees as partially unknown)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.stages import Compiled

from pals.engine.bank import Bank
from pals.engine.compilation import CompilerOptions, workspace_bytes
from pals.engine.stepping import Leaves, Run, StepArguments, StepOutcome, sample_step
from pals.engine.work import Sampled
from pals.models.build import AbstractModel, ParameterPath, abstract_ends, abstract_layer
from pals.models.config import ModelConfig
from pals.models.decoder import Decoder, DecoderLayer
from pals.models.numerics import Numerics
from pals.models.paged import LayerCache, StepShape, Tables, make_rows
from pals.types import LayerRange


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Some of a shard's leaves, by their places in its flat tuple."""

    places: tuple[int, ...]

    def take(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        return tuple([leaves[place] for place in self.places])


class _Kind:
    """Layers that one program serves."""

    def __init__(self, config: ModelConfig, layer: AbstractModel[DecoderLayer]) -> None:
        self._config = config
        self._layer = layer
        self.step = jax.jit(self._run, static_argnames="shape", donate_argnames=("cache", "x"))

    def _run(
        self, leaves: Leaves, cache: LayerCache, x: jax.Array, tables: Tables, *, shape: StepShape
    ) -> tuple[jax.Array, LayerCache]:
        rows = make_rows(self._config, shape, tables)
        return self._layer.merge(leaves)(x, cache, rows)


class LayeredSteps:
    """Compiles each kind of layer; implements `pals.engine.stepping.StepBuilder`.

    Args:
        config: Of the model.
        layers: Of the shard.
        numerics: In which numbers it computes.
        model: The shard's, for the order of its leaves.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: LayerRange,
        numerics: Numerics,
        model: AbstractModel[Decoder],
    ) -> None:
        self._is_head = layers.start == 0
        place_of = {path: place for place, path in enumerate(model.parameters)}
        self._ends_model = abstract_ends(config, layers, numerics)
        self._ends = _part((), self._ends_model, place_of)
        self._kinds: dict[object, _Kind] = {}
        self._layers: list[tuple[_Kind, _Part]] = []
        for number, layer in enumerate(range(layers.start, layers.stop)):
            module = abstract_layer(config, layer, numerics)
            shapes = tuple(module.parameters.items())
            key = (module.graphdef, shapes, config.cache_shapes(layer))
            kind = self._kinds.setdefault(key, _Kind(config, module))
            self._layers.append((kind, _part(("layers", number), module, place_of)))
        self._embed = jax.jit(self._run_embed)
        self._sample = jax.jit(self._run_sample, static_argnames="shape", donate_argnames="bank")

    def compile(
        self, arguments: StepArguments, shape: StepShape, options: CompilerOptions | None
    ) -> tuple[Run, int]:
        """Compile a step of such arguments; see `StepBuilder`."""
        ends = self._ends.take(arguments.leaves)
        embed = sample = None
        hidden = arguments.inputs
        if self._is_head:
            lowered = self._embed.lower(ends, arguments.inputs)
            embed, hidden = lowered.compile(options), lowered.out_info
        steps = self._compile_kinds(arguments, hidden, shape, options)
        if arguments.sampling is not None:
            lowered = self._sample.lower(
                ends, arguments.bank, hidden, arguments.tables, arguments.sampling, shape=shape
            )
            sample = lowered.compile(options)
        compiled = [step for step in (embed, *steps.values(), sample) if step is not None]
        run = _LayeredRun(self._ends, self._layers, embed, steps, sample)
        return run, max(map(workspace_bytes, compiled))

    def _compile_kinds(
        self,
        arguments: StepArguments,
        hidden: jax.Array | jax.ShapeDtypeStruct,
        shape: StepShape,
        options: CompilerOptions | None,
    ) -> dict[_Kind, Compiled]:
        steps: dict[_Kind, Compiled] = {}
        for (kind, part), cache in zip(self._layers, arguments.cache, strict=True):
            if kind not in steps:
                leaves = part.take(arguments.leaves)
                lowered = kind.step.lower(leaves, cache, hidden, arguments.tables, shape=shape)
                steps[kind] = lowered.compile(options)
        return steps

    def _run_embed(self, leaves: Leaves, token_ids: jax.Array) -> jax.Array:
        return self._ends_model.merge(leaves).embed(token_ids)

    def _run_sample(
        self,
        leaves: Leaves,
        bank: Bank,
        x: jax.Array,
        tables: Tables,
        sampling: jax.Array,
        *,
        shape: StepShape,
    ) -> tuple[Sampled, Bank]:
        model = self._ends_model.merge(leaves)
        return sample_step(model, bank, x, tables, sampling, shape)


class _LayeredRun:
    """A compiled step; implements `pals.engine.stepping.Run`."""

    def __init__(
        self,
        ends: _Part,
        layers: Sequence[tuple[_Kind, _Part]],
        embed: Compiled | None,
        steps: dict[_Kind, Compiled],
        sample: Compiled | None,
    ) -> None:
        self._ends = ends
        self._embed = embed
        self._layers = [(steps[kind], part) for kind, part in layers]
        self._sample = sample

    def __call__(self, arguments: StepArguments) -> StepOutcome:
        leaves, caches, bank, x, tables, sampling = arguments
        tables = jax.device_put(tables)  # once for all layers
        ends = self._ends.take(leaves)
        # The first layer is given x for good, which may be no view of the host's array then.
        x = self._embed(ends, x) if self._embed else jax.device_put(x, may_alias=False)
        kept: list[LayerCache] = []
        for (step, part), cache in zip(self._layers, caches, strict=True):
            x, cache = step(part.take(leaves), cache, x, tables)
            kept.append(cache)
        if self._sample is None:
            return StepOutcome(x, tuple(kept), bank)
        sampled, bank = self._sample(ends, bank, x, tables, sampling)
        return StepOutcome(sampled, tuple(kept), bank)


def _part(
    prefix: ParameterPath, module: AbstractModel[Any], place_of: dict[ParameterPath, int]
) -> _Part:
    return _Part(places=tuple(place_of[(*prefix, *path)] for path in module.parameters))
