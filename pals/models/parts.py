"""Which part of a model a tensor belongs to, and which parts a shard needs.

A part is what is fetched and kept as one: one layer, the embedding, or the rest (final
norm and LM head). The number in a tensor's name says which.
"""

from __future__ import annotations

import re

from pals.types import LayerRange

EMBEDDING = "embedding"
REST = "rest"

_ROOT = r"(?:language_model\.)?(?:model\.)?(?:language_model\.)?"
_LAYER = re.compile(_ROOT + r"layers\.(\d{1,6})\.")
_EMBEDDING = re.compile(_ROOT + r"embed_tokens\.")
_OTHER_TOWER = re.compile(
    r"(?:model\.)?(?:vision_tower|vision_model|visual|multi_modal_projector|audio_tower)\."
)


def layer_part(layer: int) -> str:
    """Return the name of a layer's part."""
    return f"layer-{layer:05}"


def layer_of(tensor: str) -> int | None:
    """Return the layer of a tensor, or None of one that belongs to no text layer."""
    match = _LAYER.match(tensor)
    return None if match is None else int(match[1])


def part_of(tensor: str) -> str | None:
    """Return the part of a tensor; None of one that no shard reads, as a vision tower's."""
    layer = layer_of(tensor)
    if layer is not None:
        return layer_part(layer)
    if _EMBEDDING.match(tensor):
        return EMBEDDING
    return None if _OTHER_TOWER.match(tensor) else REST


def parts_of(layers: LayerRange, num_layers: int, *, tied: bool) -> frozenset[str]:
    """Return the parts that a shard of ``layers`` needs.

    The head takes the embedding; the tail takes the rest, and the embedding where it is
    ``tied`` to the LM head. Layers from ``num_layers`` on (as the layer of DeepSeek V3
    that predicts several tokens) are of no shard.
    """
    parts = {layer_part(layer) for layer in range(layers.start, layers.stop)}
    is_tail = layers.stop == num_layers
    if layers.start == 0 or (tied and is_tail):
        parts.add(EMBEDDING)
    if is_tail:
        parts.add(REST)
    return frozenset(parts)


def is_needed(tensor: str, layers: LayerRange, num_layers: int, *, tied: bool) -> bool:
    """Return whether a shard of ``layers`` reads a tensor of this name."""
    return part_of(tensor) in parts_of(layers, num_layers, tied=tied)
