# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""Rotary position embedding: frequencies on the host, angles and turns in the step."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pals.models.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    RopeConfig,
    YarnScaling,
)


class RopeTable(NamedTuple):
    """Cosine and sine of the angles of a step's tokens, each [M, R] float32.

    R is the width of a head that turns.
    """

    cos: jax.Array
    sin: jax.Array


def make_table(rope: RopeConfig, positions: jax.Array) -> RopeTable:
    """Return the table of tokens at ``positions`` [M]."""
    # float32 whatever the compute dtype: bf16 cannot tell position 256 from 257.
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(rope)
    angles = jnp.concatenate([angles, angles], axis=-1)
    factor = attention_factor(rope)
    return RopeTable(cos=jnp.cos(angles) * factor, sin=jnp.sin(angles) * factor)


def rotate(x: jax.Array, table: RopeTable) -> jax.Array:
    """Turn heads [..., N, H], pairing dimension h with h + R / 2; what is past R stays."""
    width = table.cos.shape[-1]
    turning, still = x[..., :width].astype(jnp.float32), x[..., width:]
    half = width // 2
    turned = jnp.concatenate([-turning[..., half:], turning[..., :half]], axis=-1)
    turned = turning * table.cos[..., None, :] + turned * table.sin[..., None, :]
    return jnp.concatenate([turned.astype(x.dtype), still], axis=-1)


def pair_halves(x: jax.Array) -> jax.Array:
    """Reorder [..., H] from pairs of neighbours to the pairs that `rotate` turns."""
    return jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


def inverse_frequencies(rope: RopeConfig) -> np.ndarray:
    """Return the float32 angle per position of each pair of dimensions, [R / 2]."""
    exponents = np.arange(0, rope.width, 2, dtype=np.float32) / np.float32(rope.width)
    frequencies = np.float32(1.0) / np.float32(rope.theta) ** exponents
    match rope.scaling:
        case LinearScaling(factor=factor):
            frequencies = frequencies / np.float32(factor)
        case Llama3Scaling() as scaling:
            frequencies = scale_llama3(scaling, frequencies)
        case YarnScaling() as scaling:
            frequencies = scale_yarn(scaling, rope, frequencies)
        case DynamicScaling() | None:
            pass
    return frequencies.astype(np.float32)


def attention_factor(rope: RopeConfig) -> float:
    """Return what cosine and sine are multiplied by."""
    return rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling) else 1.0


def scale_llama3(scaling: Llama3Scaling, frequencies: np.ndarray) -> np.ndarray:
    """Slow the low frequencies [R / 2] down by ``factor``, as Llama 3.1 does.

    Source: ``_compute_llama3_parameters`` of transformers' modeling_rope_utils.py.
    """
    wavelengths = 2 * np.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return (1.0 - keep) * frequencies / scaling.factor + keep * frequencies


def scale_yarn(scaling: YarnScaling, rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """Blend slowed and unchanged frequencies [R / 2] by how often they turn.

    Source: https://arxiv.org/abs/2309.00071, section 3.2, and ``_compute_yarn_parameters``
    of transformers' modeling_rope_utils.py, whose rounding decides the range.
    """

    def dimension_of(turns: float) -> float:
        positions = scaling.original_max_position_embeddings
        return rope.width * math.log(positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.width - 1)
    if low == high:
        high += 0.001  # a ramp of no length has no slope
    ramp = np.clip((np.arange(rope.width // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)
