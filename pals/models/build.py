# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (jax and flax annotate their functions with types that pyright sees as partially unknown)
"""A shard's model without its numbers: what parameters it has, and how to give it some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import jax
from flax import nnx
from jax.sharding import Mesh
from jax.tree_util import PyTreeDef

from pals.models.config import ModelConfig
from pals.models.decoder import Decoder
from pals.models.experts import expert_sharding
from pals.models.family import family_of
from pals.models.numerics import Numerics
from pals.types import LayerRange

ParameterPath = tuple[str | int, ...]
"""Attribute names and list positions from the model down to a parameter."""

Parameters = Mapping[ParameterPath, jax.ShapeDtypeStruct]


@dataclass(frozen=True, slots=True)
class AbstractModel:
    """The modules of a shard and the shapes of their parameters.

    Attributes:
        parameters: In the order in which `merge` takes them; with their places where the
            model is spread over several devices.
    """

    graphdef: nnx.GraphDef[Decoder]
    treedef: PyTreeDef  # pyright: ignore[reportInvalidTypeForm] jax binds it at run time
    parameters: Parameters

    @classmethod
    def build(cls, config: ModelConfig, layers: LayerRange, numerics: Numerics) -> AbstractModel:
        """Build the modules of ``layers``; no array is made."""
        build_layer = family_of(config).build_layer
        model = nnx.eval_shape(lambda: Decoder(config, layers, numerics, build_layer))
        graphdef, state = nnx.split(model)
        shapes, treedef = jax.tree.flatten(state)
        paths = cast("Sequence[ParameterPath]", nnx.to_flat_state(state).paths)
        parameters = dict(zip(paths, shapes, strict=True))
        mesh = numerics.moe.mesh
        if mesh is not None:
            parameters = {path: _placed(path, leaf, mesh) for path, leaf in parameters.items()}
        return cls(graphdef, treedef, parameters)

    def merge(self, leaves: Sequence[jax.Array]) -> Decoder:
        """Return the model with these parameters; cheap enough for the inside of a step."""
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))


def _placed(path: ParameterPath, leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=expert_sharding(path, mesh))
