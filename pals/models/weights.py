"""Fills a shard's parameters from safetensors, one tensor at a time.

A parameter's path in the module tree is its weight's name in the checkpoint, apart from
the table below. The check is strict both ways: a weight that is missing, that nothing
reads, or that has another shape refuses the model.
"""
# pyright: reportUnknownMemberType=false
# (jax annotates its functions with types that pyright sees as partially unknown)

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from pals.errors import CorruptModel
from pals.models.config import ModelConfig
from pals.models.safetensors import TensorEntry, WeightFiles
from pals.types import LayerRange

ParameterPath = tuple[str | int, ...]
"""Attribute names and list positions from the model down to a parameter."""

MODULE_NAMES = {
    "embed_tokens": "model.embed_tokens",
    "layers": "model.layers",
    "norm": "model.norm",
    "lm_head": "lm_head",
}

END_WEIGHTS = frozenset({"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"})
"""Weights outside the layers, which only the head or the tail holds."""

MAX_PROBLEMS = 8

_LAYER = re.compile(r"model\.layers\.(\d{1,5})\.")
_COMPUTED = re.compile(r"model\.layers\.\d{1,5}\.self_attn\.rotary_emb\.inv_freq")


def weight_name(path: ParameterPath, config: ModelConfig, layers: LayerRange) -> str:
    """Return the checkpoint's name for a parameter of the shard of ``layers``."""
    module, *rest = path
    if module == "lm_head" and config.tie_word_embeddings:
        module = "embed_tokens"
    if module == "layers":
        rest[0] = layers.start + int(rest[0])
    return ".".join([MODULE_NAMES[str(module)], *map(str, rest)])


def load_parameters(
    folder: Path,
    config: ModelConfig,
    layers: LayerRange,
    parameters: Mapping[ParameterPath, jax.ShapeDtypeStruct],
) -> list[jax.Array]:
    """Read the weights of ``layers`` to the default device, in the order of ``parameters``.

    At most one tensor at a time is held on the host beside what is on the device.

    Raises:
        CorruptModel: Files are malformed, or weights are missing, unexpected or misshapen.
        UnsupportedModel: A weight has a dtype that is not read.
    """
    files = WeightFiles.open(folder)
    names = [weight_name(path, config, layers) for path in parameters]
    shapes = {name: p.shape for name, p in zip(names, parameters.values(), strict=True)}
    problems = name_problems(set(files.file_of), set(names), config, layers)
    entries = files.entries(name for name in shapes if name in files.file_of)
    problems += shape_problems(entries, shapes)
    if problems:
        raise CorruptModel(source=folder, problem=summarize(problems))
    return [
        load_tensor(entries[name], p.dtype)
        for name, p in zip(names, parameters.values(), strict=True)
    ]


def load_tensor(entry: TensorEntry, dtype: jnp.dtype) -> jax.Array:
    """Read one tensor to the device in the compute dtype."""
    return jax.device_put(entry.read().astype(dtype, copy=False))


def name_problems(
    present: set[str], needed: set[str], config: ModelConfig, layers: LayerRange
) -> list[str]:
    """Return what is wrong with the names of a checkpoint, seen from one shard."""
    missing = [f"`{name}` is missing" for name in sorted(needed - present)]
    unexpected = [
        f"`{name}` is unexpected"
        for name in sorted(present - needed)
        if not is_held_elsewhere(name, config, layers)
    ]
    return missing + unexpected


def is_held_elsewhere(name: str, config: ModelConfig, layers: LayerRange) -> bool:
    """Return whether a shard of ``layers`` rightly leaves this weight alone."""
    if name in END_WEIGHTS or _COMPUTED.fullmatch(name):
        return True
    match = _LAYER.match(name)
    if match is None:
        return False
    layer = int(match[1])
    return layer < config.num_layers and not layers.start <= layer < layers.stop


def shape_problems(
    entries: Mapping[str, TensorEntry], shapes: Mapping[str, Sequence[int]]
) -> list[str]:
    """Return which weights do not have the shape that config.json asks for."""
    return [
        f"`{name}` has shape {list(entry.shape)} instead of {list(shapes[name])}"
        for name, entry in sorted(entries.items())
        if entry.shape != tuple(shapes[name])
    ]


def summarize(problems: Sequence[str]) -> str:
    """Join the first problems into one line and count the others."""
    more = len(problems) - MAX_PROBLEMS
    shown = "; ".join(problems[:MAX_PROBLEMS])
    return f"{shown}; and {more} more" if more > 0 else shown
