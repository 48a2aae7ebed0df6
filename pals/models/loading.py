"""A shard's parameters: from layers that were prepared before, else from the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import jax

from pals.models.build import AbstractModel, ParameterPath, Parameters
from pals.models.family import family_of
from pals.models.layer_hashes import layer_hashes
from pals.models.numerics import Numerics
from pals.models.prepared import PreparedLayers
from pals.models.snapshot import Snapshot
from pals.models.weights import WeightSource
from pals.types import LayerRange


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
        leaves = loader.read_source(list(parameters))
        hashes = layer_hashes(snapshot.weights(), layers)
    else:
        prepared = PreparedLayers.open(snapshot.manifest, numerics.stored_kind)
        leaves = loader.read_prepared(prepared)
        hashes = loader.read_hashes(prepared)
    return LoadedParameters(
        leaves=tuple(leaves[path] for path in parameters), layer_hashes=tuple(hashes)
    )


class _Loader:
    def __init__(
        self, snapshot: Snapshot, layers: LayerRange, numerics: Numerics, parameters: Parameters
    ) -> None:
        self._snapshot = snapshot
        self._layers = layers
        self._numerics = numerics
        self._parameters = parameters

    @cached_property
    def _source(self) -> WeightSource:
        config = self._snapshot.config
        logical = AbstractModel.build(config, self._layers, self._numerics.plain).parameters
        table = family_of(config).weights
        return WeightSource(self._snapshot.weights(), config, self._layers, table, logical)

    def read_source(self, paths: Sequence[ParameterPath]) -> dict[ParameterPath, jax.Array]:
        """Read some parameters from the checkpoint."""
        wanted = {path: self._parameters[path] for path in paths}
        return dict(self._source.load(wanted, group_size=self._numerics.group_size))

    def read_prepared(self, prepared: PreparedLayers) -> dict[ParameterPath, jax.Array]:
        """Read each part as it was kept; read the others from the checkpoint and keep them."""
        leaves: dict[ParameterPath, jax.Array] = {}
        for part, paths in self.parts().items():
            shapes = {_name(path): self._parameters[path] for path in paths}
            arrays = prepared.load(part, shapes)
            if arrays is None:
                read = self.read_source(paths)
                arrays = [read[path] for path in paths]
                prepared.save(part, list(shapes), arrays)
            leaves |= dict(zip(paths, arrays, strict=True))
        return leaves

    def parts(self) -> dict[str, list[ParameterPath]]:
        """Return the parameters of each layer and of each end of the model."""
        parts: dict[str, list[ParameterPath]] = {}
        for path in self._parameters:
            part = str(path[0])
            if part == "layers":
                part = self._layer_part(self._layers.start + int(path[1]))
            parts.setdefault(part, []).append(path)
        return parts

    def read_hashes(self, prepared: PreparedLayers) -> list[bytes]:
        """Return the hash of each layer's source, which is kept with the layer."""
        parts = [self._layer_part(n) for n in range(self._layers.start, self._layers.stop)]
        known = [prepared.read_hash(part) for part in parts]
        found = [layer_hash for layer_hash in known if layer_hash is not None]
        if len(found) == len(parts):
            return found
        hashes = layer_hashes(self._snapshot.weights(), self._layers)
        for part, layer_hash in zip(parts, hashes, strict=True):
            prepared.keep_hash(part, layer_hash)
        return hashes

    @staticmethod
    def _layer_part(layer: int) -> str:
        return f"layer-{layer:05}"


def _name(path: ParameterPath) -> str:
    """Return the name of a parameter within its part, the same wherever the layer stands."""
    inner = path[2:] if path[0] == "layers" else path[1:]
    return ".".join(map(str, inner))
