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
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.stages import Compiled

from pals.engine.bank import Bank
from pals.engine.compilation import CompilerOptions, workspace_bytes
from pals.engine.lowering import Lowerings
from pals.engine.sampler import sample
from pals.engine.stepping import (
    Leaves,
    Run,
    StepArguments,
    StepOutcome,
    pool_chunk,
    tail_logits,
)
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
    """Layers that one program serves.

    Args:
        config: Of the model.
        layer: One of them.
        first: The first layer of the whole model that is of this kind, which shards of any
            of its layers know it by.
    """

    def __init__(self, config: ModelConfig, layer: AbstractModel[DecoderLayer], first: int) -> None:
        self._config = config
        self._layer = layer
        self.name = f"layer {first}"

    def run(
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
        kinds: dict[object, _Kind] = {}
        self._layers: list[tuple[_Kind, _Part]] = []
        for number, layer in enumerate(range(layers.start, layers.stop)):
            module, key = _look_at(config, layer, numerics)
            if key not in kinds:
                first = next(n for n in range(layer + 1) if _look_at(config, n, numerics)[1] == key)
                kinds[key] = _Kind(config, module, first)
            self._layers.append((kinds[key], _part(("layers", number), module, place_of)))
        self._lowerings = Lowerings(
            config, numerics, self._is_head, are_kept=numerics.moe.trace is None
        )
        # It is the same for every step of as many sampled tokens, and every model of as many
        # words: compiled with the logits, it would take longer than a layer each time.
        self._sampler_lowerings = Lowerings()
        self._samplers: dict[tuple[int, str], Compiled] = {}

    def compile(
        self, arguments: StepArguments, shape: StepShape, options: CompilerOptions | None
    ) -> tuple[Run, int]:
        """Compile a step of such arguments; see `StepBuilder`."""
        ends = self._ends.take(arguments.leaves)
        lowered = self._lowerings.lower(
            self._run_begin, (ends, arguments.inputs, arguments.tables), name="begin"
        )
        begin, (hidden, _) = lowered.compile(options), lowered.out_info
        steps = self._compile_kinds(arguments, hidden, shape, options)
        workspace = [workspace_bytes(step) for step in (begin, *steps.values())]
        tail = None
        if arguments.sampling is not None:
            tail = self._compile_tail(arguments, hidden, shape, options)
            workspace.append(tail.workspace_bytes)
        return _LayeredRun(self._ends, self._layers, begin, steps, tail), max(workspace)

    def _compile_tail(
        self,
        arguments: StepArguments,
        hidden: jax.Array | jax.ShapeDtypeStruct,
        shape: StepShape,
        options: CompilerOptions | None,
    ) -> _Tail:
        ends = self._ends.take(arguments.leaves)
        lowered = self._lowerings.lower(
            partial(self._run_logits, shape=shape),
            (ends, hidden, arguments.tables),
            name=f"logits {shape}",
        )
        logits, positions, _ = lowered.out_info
        key = (logits.shape[0], str(options))
        if key not in self._samplers:
            sampler = self._sampler_lowerings.lower(
                sample,
                (logits, arguments.sampling, positions, arguments.bank),
                name="sample",
                donated=(3,),
            )
            self._samplers[key] = sampler.compile(options)
        return _Tail(lowered.compile(options), self._samplers[key], logits.size * 4)

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
                lowered = self._lowerings.lower(
                    partial(kind.run, shape=shape),
                    (part.take(arguments.leaves), cache, hidden, arguments.tables),
                    name=f"{kind.name} {shape}",
                    donated=(1, 2),
                )
                steps[kind] = lowered.compile(options)
        return steps

    def _run_begin(
        self, leaves: Leaves, inputs: jax.Array, tables: Tables
    ) -> tuple[jax.Array, Tables]:
        """Bring what the host made to the device, once for all layers.

        A program does that in a sixth of the time that `jax.device_put` takes. Its results
        are no views of the host's arrays: the first layer is given x for good.
        """
        x = self._ends_model.merge(leaves).embed(inputs) if self._is_head else jnp.copy(inputs)
        return x, jax.tree.map(jnp.copy, tables)

    def _run_logits(
        self, leaves: Leaves, x: jax.Array, tables: Tables, *, shape: StepShape
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        model = self._ends_model.merge(leaves)
        return *tail_logits(model, x, tables, shape), pool_chunk(model, x, tables, shape)


@dataclass(frozen=True, slots=True)
class _Tail:
    """What makes logits of hidden states, and the sum of a chunk's; and what samples them."""

    logits: Compiled
    sampler: Compiled
    logits_bytes: int

    @property
    def workspace_bytes(self) -> int:
        """The logits lie between the two, and are a temporary of the step."""
        return self.logits_bytes + max(map(workspace_bytes, (self.logits, self.sampler)))

    def __call__(
        self, ends: Leaves, bank: Bank | None, x: jax.Array, tables: Tables, sampling: jax.Array
    ) -> tuple[Sampled, Bank, jax.Array | None]:
        logits, positions, pooled = self.logits(ends, x, tables)
        return *self.sampler(logits, sampling, positions, bank), pooled


class _LayeredRun:
    """A compiled step; implements `pals.engine.stepping.Run`."""

    def __init__(
        self,
        ends: _Part,
        layers: Sequence[tuple[_Kind, _Part]],
        begin: Compiled,
        steps: dict[_Kind, Compiled],
        tail: _Tail | None,
    ) -> None:
        self._ends = ends
        self._begin = begin
        self._layers = [(steps[kind], part) for kind, part in layers]
        self._tail = tail

    def __call__(self, arguments: StepArguments) -> StepOutcome:
        leaves, caches, bank, x, tables, sampling = arguments
        ends = self._ends.take(leaves)
        x, tables = self._begin(ends, x, tables)
        kept: list[LayerCache] = []
        for (step, part), cache in zip(self._layers, caches, strict=True):
            x, cache = step(part.take(leaves), cache, x, tables)
            kept.append(cache)
        if self._tail is None:
            return StepOutcome(x, tuple(kept), bank, None)
        sampled, bank, pooled = self._tail(ends, bank, x, tables, sampling)
        return StepOutcome(sampled, tuple(kept), bank, pooled)


def _look_at(
    config: ModelConfig, layer: int, numerics: Numerics
) -> tuple[AbstractModel[DecoderLayer], object]:
    """Return a layer of a model, and what is equal for layers that one program serves."""
    module = abstract_layer(config, layer, numerics)
    shapes = tuple(module.parameters.items())
    return module, (module.graphdef, shapes, config.cache_shapes(layer))


def _part(
    prefix: ParameterPath, module: AbstractModel[Any], place_of: dict[ParameterPath, int]
) -> _Part:
    return _Part(places=tuple(place_of[(*prefix, *path)] for path in module.parameters))
