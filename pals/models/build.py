# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (jax and flax annotate their functions with types that pyright sees as partially unknown)
"""A shard's model without its numbers: what parameters it has, and how to give it some."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import jax
from flax import nnx
from jax.sharding import Mesh
from jax.tree_util import PyTreeDef

from pals.models.config import ModelConfig
from pals.models.decoder import Decoder, DecoderLayer
from pals.models.family import family_of
from pals.models.numerics import Numerics
from pals.models.spread import place
from pals.types import LayerRange

ParameterPath = tuple[str | int, ...]
"""Attribute names and list positions from the model down to a parameter."""

Parameters = Mapping[ParameterPath, jax.ShapeDtypeStruct]

Module = TypeVar("Module")


@dataclass(frozen=True, slots=True)
class AbstractModel(Generic[Module]):
    """A module, or a tree of them, and the shapes of its parameters.

    Attributes:
        parameters: In the order in which `merge` takes them; with their places where the
            model is spread over several devices.
    """

    graphdef: nnx.GraphDef[Module]
    treedef: PyTreeDef  # pyright: ignore[reportInvalidTypeForm] jax binds it at run time
    parameters: Parameters

    @classmethod
    def build(
        cls, config: ModelConfig, layers: LayerRange, numerics: Numerics
    ) -> AbstractModel[Decoder]:
        """Look at the part of a model that a shard of ``layers`` holds.

        Raises:
            CannotDivide: It cannot be spread over the devices of ``numerics``.
        """
        build_layer = family_of(config).build_layer
        return AbstractModel[Decoder].of(
            lambda: Decoder(config, layers, numerics, build_layer), numerics.mesh
        )

    @classmethod
    def of(cls, make: Callable[[], Module], mesh: Mesh | None = None) -> AbstractModel[Module]:
        """Look at what ``make`` builds; no array is made.

        Args:
            make: Builds the module.
            mesh: The devices over which it is spread.
        """
        graphdef, state = nnx.split(nnx.eval_shape(make))
        shapes, treedef = jax.tree.flatten(state)
        flat = nnx.to_flat_state(state)
        paths = cast("Sequence[ParameterPath]", flat.paths)
        if mesh is not None:
            pairs = zip(flat.leaves, shapes, strict=True)
            shapes = [_placed(variable, shape, mesh) for variable, shape in pairs]
        parameters = dict(zip(paths, shapes, strict=True))
        return cls(graphdef, treedef, parameters)

    def merge(self, leaves: Sequence[jax.Array]) -> Module:
        """Return the module with these parameters; cheap enough for the inside of a step."""
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))


def abstract_layer(
    config: ModelConfig, layer: int, numerics: Numerics
) -> AbstractModel[DecoderLayer]:
    """Return one layer of a model."""
    build_layer = family_of(config).build_layer
    return AbstractModel[DecoderLayer].of(
        lambda: build_layer(config, layer, numerics), numerics.mesh
    )


def abstract_ends(
    config: ModelConfig, layers: LayerRange, numerics: Numerics
) -> AbstractModel[Decoder]:
    """Return what a shard of ``layers`` holds beside its layers: embedding, norm and head."""
    build_layer = family_of(config).build_layer

    def make() -> Decoder:
        model = Decoder(config, layers, numerics, build_layer)
        model.layers = nnx.List([])
        return model

    return AbstractModel[Decoder].of(make, numerics.mesh)


def _placed(
    variable: nnx.Variable[jax.Array], shape: jax.ShapeDtypeStruct, mesh: Mesh
) -> jax.ShapeDtypeStruct:
    sharding = place(mesh, variable.get_metadata().get("split_axis"), len(shape.shape))
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
