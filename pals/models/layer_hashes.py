"""What the source bytes of each layer are, in 32 bytes: holders that differ never chain."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from pals.errors import CorruptModel
from pals.models.hashes import file_stamp, keep_digest, kept_digest
from pals.models.parts import layer_of
from pals.models.safetensors import TensorEntry, Weights
from pals.models.store import hash_tensor
from pals.types import LayerRange


def layer_hashes(weights: Weights, layers: LayerRange) -> list[bytes]:
    """Return a hash of each layer's weights as the checkpoint has them.

    It is the SHA-256 of the canonical JSON list of (name, dtype, shape, SHA-256 of the
    bytes) of the layer's tensors in the order of their names: so it does not depend on
    the files that hold them, nor on the order in which they were downloaded.

    Args:
        weights: Weights of which those of ``layers`` are on this machine.
        layers: The range.

    Returns:
        32 bytes a layer, in the order of the layers.

    Raises:
        CorruptModel: A layer has no tensors, or a file is malformed.
        ModelNotFound: A tensor was not downloaded.
    """
    names: dict[int, list[str]] = {layer: [] for layer in range(layers.start, layers.stop)}
    for name in weights.file_of:
        layer = layer_of(name)
        if layer in names:
            names[layer].append(name)
    return [_layer_hash(weights, layer, sorted(names[layer])) for layer in names]


def _layer_hash(weights: Weights, layer: int, names: list[str]) -> bytes:
    if not names:
        raise CorruptModel(source=weights.folder, problem=f"it has no tensor of layer {layer}")
    entries = weights.entries(names)
    tensors = [entries[name] for name in names]
    known = weights.known_hashes(names)
    if known.keys() == set(names):
        return bytes.fromhex(_digest(tensors, known))
    state = _state_of(tensors)
    digest = kept_digest(state)
    if digest is None:
        digest = _digest(tensors, {tensor.name: hash_tensor(tensor) for tensor in tensors})
        if _state_of(tensors) == state:
            keep_digest(state, digest)
    return bytes.fromhex(digest)


def _digest(tensors: Sequence[TensorEntry], hashes: Mapping[str, str]) -> str:
    listed = [[t.name, t.dtype, list(t.shape), hashes[t.name]] for t in tensors]
    return hashlib.sha256(json.dumps(listed, separators=(",", ":")).encode()).hexdigest()


def _state_of(tensors: Sequence[TensorEntry]) -> list[object]:
    """Return what changes when any of the files does."""
    places = [[t.name, t.dtype, list(t.shape), str(t.path), t.offset] for t in tensors]
    stamps = [file_stamp(path.stat()) for path in sorted({t.path for t in tensors})]
    return ["layer", places, stamps]
