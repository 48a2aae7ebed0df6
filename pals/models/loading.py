"""A shard's parameters: from layers that were prepared before, else from the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import jax

from pals.models.build import AbstractModel, ParameterPath, Parameters
from pals.models.family import family_of
from pals.models.layer_hashes import layer_hashes
from pals.models.numerics import Numerics
from pals.models.safetensors import Weights
from pals.models.snapshot import Snapshot
from pals.models.weights import WeightSource, logical_path
from pals.types import LayerRange

if TYPE_CHECKING:
    from pals.models.prepared import PreparedLayers


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedParameters:
    """What a shard computes with.

    Attributes:
        leaves: In the order of the model's parameters.
        layer_hashes: SHA-256 of the source bytes of each layer, 32 bytes each.
    """

    leaves: tuple[jax.Array, ...]
    layer_hashes: tuple[bytes, ...]


def load_shard_parameters(
    snapshot: Snapshot, layers: LayerRange, numerics: Numerics, parameters: Parameters
) -> LoadedParameters:
    """Read the parameters of ``layers`` to the default device, a layer at a time.

    Quantised layers are kept (`pals.models.prepared`), so that a restart, or a range that
    moves over layers it held before, opens no file of the checkpoint. Plain ones are read
    from the checkpoint, which is as fast.

    Raises:
        CorruptModel: The weights do not fit the config.
        UnsupportedModel: The weights have a dtype that is not read.
        ModelNotFound: Weights that are needed are not on this machine.
    """
    loader = _Loader(snapshot, layers, numerics, parameters)
    if numerics.weights == "plain":
        leaves = loader.read_source()
        hashes = layer_hashes(snapshot.weights(), layers)
    else:
        # Orbax takes half a second to import, and plain shards are started often
        from pals.models.prepared import PreparedLayers

        prepared = PreparedLayers.open(snapshot.manifest, numerics.stored_kind)
        leaves = loader.read_prepared(prepared)
        hashes = loader.read_hashes(prepared)
    return LoadedParameters(
        leaves=tuple(leaves[path] for path in parameters), layer_hashes=tuple(hashes)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What is kept together: a layer, or an end of the model.

    Attributes:
        layer: Its number in the whole model; None for an end.
    """

    name: str
    layer: int | None
    parameters: Parameters

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The parameters by names that are the same wherever the layer stands."""
        depth = 1 if self.layer is None else 2
        return {".".join(map(str, path[depth:])): leaf for path, leaf in self.parameters.items()}


class _Loader:
    def __init__(
        self, snapshot: Snapshot, layers: LayerRange, numerics: Numerics, parameters: Parameters
    ) -> None:
        self._snapshot = snapshot
        self._layers = layers
        self._numerics = numerics
        self._parameters = parameters

    @cached_property
    def _weights(self) -> Weights:
        return self._snapshot.weights()

    def read_source(self) -> dict[ParameterPath, jax.Array]:
        """Read all parameters from the checkpoint."""
        source = self._open_source(self._parameters)
        return dict(source.load(self._parameters, group_size=self._numerics.group_size))

    def read_prepared(self, prepared: PreparedLayers) -> dict[ParameterPath, jax.Array]:
        """Read each part as it was kept; read the others from the checkpoint and keep them."""
        leaves: dict[ParameterPath, jax.Array] = {}
        missing: list[_Part] = []
        for part in self._parts():
            arrays = prepared.load(part.name, part.shapes)
            if arrays is None:
                missing.append(part)
            else:
                leaves |= dict(zip(part.parameters, arrays, strict=True))
        return leaves | (self._prepare(missing, prepared) if missing else {})

    def _prepare(
        self, parts: Sequence[_Part], prepared: PreparedLayers
    ) -> dict[ParameterPath, jax.Array]:
        """Read parts from the checkpoint and keep each before the next is read."""
        leaves: dict[ParameterPath, jax.Array] = {}
        source = self._open_source([path for part in parts for path in part.parameters])
        for part in parts:
            read = dict(source.load(part.parameters, group_size=self._numerics.group_size))
            arrays = {
                name: read[path] for name, path in zip(part.shapes, part.parameters, strict=True)
            }
            source_hash = None if part.layer is None else self._hash_layer(part.layer)
            prepared.save(part.name, arrays, source_hash=source_hash)
            leaves |= read
        return leaves

    def _open_source(self, paths: Iterable[ParameterPath]) -> WeightSource:
        config = self._snapshot.config
        logical = AbstractModel.build(config, self._layers, self._numerics.plain).parameters
        table = family_of(config).weights
        wanted = {logical_path(path) for path in paths}
        return WeightSource(self._weights, config, self._layers, table, logical, wanted=wanted)

    def _parts(self) -> list[_Part]:
        """Return the parameters of each layer and of each end of the model."""
        parts: dict[str, dict[ParameterPath, jax.ShapeDtypeStruct]] = {}
        layers: dict[str, int | None] = {}
        for path, leaf in self._parameters.items():
            layer = self._layers.start + int(path[1]) if path[0] == "layers" else None
            name = str(path[0]) if layer is None else _layer_name(layer)
            layers[name] = layer
            parts.setdefault(name, {})[path] = leaf
        return [
            _Part(name=name, layer=layers[name], parameters=parameters)
            for name, parameters in parts.items()
        ]

    def read_hashes(self, prepared: PreparedLayers) -> list[bytes]:
        """Return the hash of each layer's source, which is kept with the layer."""
        return [
            prepared.read_source_hash(_layer_name(layer)) or self._hash_layer(layer)
            for layer in range(self._layers.start, self._layers.stop)
        ]

    def _hash_layer(self, layer: int) -> bytes:
        return layer_hashes(self._weights, LayerRange(layer, layer + 1))[0]


def _layer_name(layer: int) -> str:
    return f"layer-{layer:05}"
