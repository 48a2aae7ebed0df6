# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""Rotary embedding, the KV cache of one layer, and attention over it.

One formulation serves prefill (one row of many tokens) and decode (many rows of one).
The cache holds bf16 as its 16 bits: XLA on CPU would otherwise widen the whole cache to
float32 and back for each token it writes (2 x slower for one row, 10 x for four).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from pals.models.config import Llama3Scaling, ModelConfig, RopeConfig
from pals.models.layers import Linear, matmul_precision


class LayerCache(NamedTuple):
    """Keys and values of one layer, each [slots, K, C, H] in their storage dtype."""

    keys: jax.Array
    values: jax.Array


class Rows(NamedTuple):
    """Where the tokens of a step stand.

    Attributes:
        slots: [B] int32, the cache slot of each row.
        starts: [B] int32, the position of each row's first token.
        cos: [B, T, H] float32.
        sin: [B, T, H] float32.
    """

    slots: jax.Array
    starts: jax.Array
    cos: jax.Array
    sin: jax.Array


def make_rows(config: ModelConfig, slots: jax.Array, starts: jax.Array, num_tokens: int) -> Rows:
    """Return the rows of ``num_tokens`` tokens each that begin at ``starts``."""
    positions = starts[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)
    # float32 whatever the compute dtype: bf16 cannot tell position 256 from 257.
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(
        config.rope, config.head_dim
    )
    angles = jnp.concatenate([angles, angles], axis=-1)
    return Rows(slots=slots, starts=starts, cos=jnp.cos(angles), sin=jnp.sin(angles))


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Return the float32 angle per position of each half-dimension, [H / 2]."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1.0) / np.float32(rope.theta) ** exponents
    if rope.scaling is not None:
        frequencies = scale_frequencies(rope.scaling, frequencies)
    return frequencies.astype(np.float32)


def scale_frequencies(scaling: Llama3Scaling, frequencies: np.ndarray) -> np.ndarray:
    """Slow the low frequencies down by ``factor``, as Llama 3.1 does, [H / 2].

    Source: ``_compute_llama3_parameters`` of transformers' modeling_rope_utils.py.
    """
    wavelengths = 2 * np.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return (1.0 - keep) * frequencies / scaling.factor + keep * frequencies


def rotate(x: jax.Array, rows: Rows) -> jax.Array:
    """Apply rotary embedding to heads [B, T, N, H], pairing dimension h with h + H / 2."""
    half = x.shape[-1] // 2
    wide = x.astype(jnp.float32)
    turned = jnp.concatenate([-wide[..., half:], wide[..., :half]], axis=-1)
    return (wide * rows.cos[:, :, None] + turned * rows.sin[:, :, None]).astype(x.dtype)


def storage_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype in which the cache holds values of ``dtype``."""
    return jnp.dtype(jnp.uint16) if dtype == jnp.bfloat16 else dtype


def update_cache(cache: LayerCache, keys: jax.Array, values: jax.Array, rows: Rows) -> LayerCache:
    """Write new keys and values [B, T, K, H] at each row's slot and position."""
    stored = cache.keys.dtype
    keys = lax.bitcast_convert_type(keys.swapaxes(1, 2), stored)
    values = lax.bitcast_convert_type(values.swapaxes(1, 2), stored)

    def write(row: jax.Array, arrays: LayerCache) -> LayerCache:
        at = (rows.slots[row], 0, rows.starts[row], 0)
        return LayerCache(
            lax.dynamic_update_slice(arrays.keys, keys[row][None], at),
            lax.dynamic_update_slice(arrays.values, values[row][None], at),
        )

    updated: LayerCache = lax.fori_loop(0, keys.shape[0], write, cache)
    # Without the barrier XLA on CPU copies the updated cache into attention's operands.
    settled: LayerCache = lax.optimization_barrier(updated)
    return settled


def attend(queries: jax.Array, cache: LayerCache, rows: Rows, *, context: int) -> jax.Array:
    """Causal grouped-query attention over the cache (https://arxiv.org/abs/2305.13245).

    Args:
        queries: [B, T, N, H], already rotated.
        cache: Holds the keys and values of these tokens too.
        rows: Slots and positions of the queries.
        context: Positions read from each slot; at least every row's last position + 1.

    Returns:
        [B, T, N, H].
    """
    batch, tokens, num_heads, head_dim = queries.shape
    num_kv_heads = cache.keys.shape[1]
    groups = num_heads // num_kv_heads
    keys = read_slots(cache.keys, rows.slots, context, queries.dtype)
    values = read_slots(cache.values, rows.slots, context, queries.dtype)
    # The slot's former session may have left infinities, which a weight of 0 would not undo.
    written = jnp.arange(context) < (rows.starts + tokens)[:, None]
    values = jnp.where(written[:, None, :, None], values, 0)

    queries = queries.reshape(batch, tokens, num_kv_heads, groups, head_dim)
    queries = queries.transpose(0, 2, 1, 3, 4).reshape(batch, num_kv_heads, -1, head_dim)
    scores = batched_matmul(queries, keys, contract=3) * head_dim**-0.5
    positions = rows.starts[:, None] + jnp.repeat(jnp.arange(tokens), groups)
    visible = jnp.arange(context) <= positions[:, :, None]
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)

    mixed = batched_matmul(weights, values, contract=2).astype(values.dtype)
    mixed = mixed.reshape(batch, num_kv_heads, tokens, groups, head_dim)
    return mixed.transpose(0, 2, 1, 3, 4).reshape(batch, tokens, num_heads, head_dim)


def read_slots(array: jax.Array, slots: jax.Array, context: int, dtype: jnp.dtype) -> jax.Array:
    """Return the first ``context`` positions of each row's slot, [B, K, context, H]."""
    _, num_kv_heads, _, head_dim = array.shape
    sizes = (1, num_kv_heads, context, head_dim)
    parts = [
        lax.dynamic_slice(array, (slots[row], 0, 0, 0), sizes) for row in range(slots.shape[0])
    ]
    return lax.bitcast_convert_type(jnp.concatenate(parts), dtype)


def batched_matmul(x: jax.Array, y: jax.Array, *, contract: int) -> jax.Array:
    """Multiply [B, K, M, _] by [B, K, _, _] over y's axis ``contract``, in float32."""
    rows = x.shape[2]
    if rows == 1:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 1), (0, 0)))  # as in matmul_transposed
    product = lax.dot_general(
        x,
        y,
        (((3,), (contract,)), ((0, 1), (0, 1))),
        precision=matmul_precision(y.dtype),
        preferred_element_type=jnp.float32,
    )
    return product[:, :, :rows]


class Attention(nnx.Module):
    """Self-attention with grouped key and value heads."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype) -> None:
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = Linear(config.hidden_size, q_size, bias=bias, dtype=dtype)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=bias, dtype=dtype)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=bias, dtype=dtype)
        self.o_proj = Linear(q_size, config.hidden_size, bias=bias, dtype=dtype)
        self.head_dim = config.head_dim

    def __call__(
        self, x: jax.Array, cache: LayerCache, rows: Rows, *, context: int
    ) -> tuple[jax.Array, LayerCache]:
        """Map [B, T, D] to [B, T, D], having written these tokens to the cache."""
        with jax.named_scope("attention"):
            heads = (*x.shape[:2], -1, self.head_dim)
            queries = rotate(self.q_proj(x).reshape(heads), rows)
            keys = rotate(self.k_proj(x).reshape(heads), rows)
            values = self.v_proj(x).reshape(heads)
            cache = update_cache(cache, keys, values, rows)
            mixed = attend(queries, cache, rows, context=context)
            return self.o_proj(mixed.reshape(*x.shape[:2], -1)), cache
