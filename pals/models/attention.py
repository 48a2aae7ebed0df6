# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""The cache of one layer, and attention over it.

One formulation serves prefill (one row of many tokens) and decode (many rows of one).
The cache holds bf16 as its 16 bits: XLA on CPU would otherwise widen the whole cache to
float32 and back for each token it writes (2 x slower for one row, 10 x for four).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from pals.models.config import AttentionConfig, ModelConfig
from pals.models.layers import Linear, RMSNorm
from pals.models.matmul import matmul_precision
from pals.models.numerics import Numerics
from pals.models.rope import RopeTable, make_table, rotate

LayerCache = tuple[jax.Array, ...]
"""What one layer keeps of each token: arrays [slots, K, C, H] in their storage dtype."""


class Rows(NamedTuple):
    """Where the tokens of a step stand.

    Attributes:
        slots: [B] int32, the cache slot of each row.
        starts: [B] int32, the position of each row's first token.
        counted: [B, T] booleans, False for padding; None means that all tokens count.
        rope: One table for each entry of `ModelConfig.rope`.
    """

    slots: jax.Array
    starts: jax.Array
    counted: jax.Array | None
    rope: tuple[RopeTable, ...]


def make_rows(
    config: ModelConfig,
    slots: jax.Array,
    starts: jax.Array,
    num_tokens: int,
    lengths: jax.Array | None = None,
) -> Rows:
    """Return the rows of ``num_tokens`` tokens each that begin at ``starts``.

    Args:
        config: Of the model.
        slots: [B] int32.
        starts: [B] int32.
        num_tokens: T, padding included.
        lengths: [B] int32, how many tokens of each row count; None for all.
    """
    columns = jnp.arange(num_tokens, dtype=jnp.int32)
    positions = starts[:, None] + columns
    return Rows(
        slots=slots,
        starts=starts,
        counted=None if lengths is None else columns < lengths[:, None],
        rope=tuple(make_table(rope, positions) for rope in config.rope),
    )


def storage_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype in which the cache holds values of ``dtype``."""
    return jnp.dtype(jnp.uint16) if dtype == jnp.bfloat16 else dtype


def update_cache(cache: LayerCache, news: Sequence[jax.Array], rows: Rows) -> LayerCache:
    """Write what is new, one [B, T, K, H] for each array, at each row's slot and position."""
    stored = [lax.bitcast_convert_type(new.swapaxes(1, 2), cache[0].dtype) for new in news]

    def write(row: jax.Array, arrays: LayerCache) -> LayerCache:
        at = (rows.slots[row], 0, rows.starts[row], 0)
        return tuple(
            lax.dynamic_update_slice(array, new[row][None], at)
            for array, new in zip(arrays, stored, strict=True)
        )

    updated: LayerCache = lax.fori_loop(0, stored[0].shape[0], write, cache)
    # Without the barrier XLA on CPU copies the updated cache into attention's operands.
    settled: LayerCache = lax.optimization_barrier(updated)
    return settled


def read_slots(array: jax.Array, slots: jax.Array, context: int, dtype: jnp.dtype) -> jax.Array:
    """Return the first ``context`` positions of each row's slot, [B, K, context, H]."""
    _, num_kv_heads, _, head_dim = array.shape
    sizes = (1, num_kv_heads, context, head_dim)
    parts = [
        lax.dynamic_slice(array, (slots[row], 0, 0, 0), sizes) for row in range(slots.shape[0])
    ]
    return lax.bitcast_convert_type(jnp.concatenate(parts), dtype)


def attend(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    starts: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Causal grouped-query attention (https://arxiv.org/abs/2305.13245).

    Args:
        queries: [B, T, N, H], already turned.
        keys: [B, K, S, H], those of the queries' tokens too.
        values: [B, K, S, W].
        starts: [B] int32, the position of each row's first query.
        scale: What scores are multiplied by.
        window: Tokens that a query sees, itself included.
        sinks: [N], logits that take part in the softmax and lead to nothing
            (https://arxiv.org/abs/2309.17453).

    Returns:
        [B, T, N, W].
    """
    batch, tokens, num_heads, _ = queries.shape
    num_kv_heads, context = keys.shape[1:3]
    groups = num_heads // num_kv_heads
    columns = jnp.arange(context)
    # The slot's former session may have left infinities, which a weight of 0 would not undo.
    written = columns < (starts + tokens)[:, None]
    values = jnp.where(written[:, None, :, None], values, 0)

    scores = batched_matmul(_group(queries, num_kv_heads), keys, contract=3) * scale
    positions = (starts[:, None] + jnp.repeat(jnp.arange(tokens), groups))[:, :, None]
    visible = columns <= positions
    if window is not None:
        visible &= columns > positions - window
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    weights = _softmax(scores, sinks, tokens).astype(values.dtype)

    mixed = batched_matmul(weights, values, contract=2).astype(values.dtype)
    mixed = mixed.reshape(batch, num_kv_heads, tokens, groups, -1)
    return mixed.transpose(0, 2, 1, 3, 4).reshape(batch, tokens, num_heads, -1)


def _group(queries: jax.Array, num_kv_heads: int) -> jax.Array:
    """Return queries [B, T, N, H] by the key head that they read, [B, K, T * G, H]."""
    batch, tokens, _, head_dim = queries.shape
    queries = queries.reshape(batch, tokens, num_kv_heads, -1, head_dim)
    return queries.transpose(0, 2, 1, 3, 4).reshape(batch, num_kv_heads, -1, head_dim)


def _softmax(scores: jax.Array, sinks: jax.Array | None, tokens: int) -> jax.Array:
    """Return the weights of scores [B, K, T * G, S], beside a sink of each head [N]."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    batch, num_kv_heads, rows, _ = scores.shape
    sink = jnp.tile(sinks.astype(jnp.float32).reshape(num_kv_heads, 1, -1), (1, tokens, 1))
    sink = jnp.broadcast_to(sink.reshape(1, num_kv_heads, rows, 1), (batch, num_kv_heads, rows, 1))
    return jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]


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
    """Self-attention with grouped key and value heads; see `AttentionConfig`."""

    def __init__(self, config: ModelConfig, attention: AttentionConfig, numerics: Numerics) -> None:
        hidden_size, bias = config.hidden_size, attention.qkv_bias
        q_size, kv_size = attention.q_size, attention.kv_size
        self.q_proj = Linear(hidden_size, q_size, bias=bias, numerics=numerics)
        self.k_proj = Linear(hidden_size, kv_size, bias=bias, numerics=numerics)
        self.v_proj = Linear(hidden_size, kv_size, bias=bias, numerics=numerics)
        self.o_proj = Linear(q_size, hidden_size, bias=attention.output_bias, numerics=numerics)
        self.q_norm = _head_norm(config, attention, numerics)
        self.k_norm = _head_norm(config, attention, numerics)
        self.sinks = (
            nnx.Param(jnp.zeros((attention.num_heads,), numerics.compute))
            if attention.sinks
            else None
        )
        self.config = attention

    def __call__(
        self, x: jax.Array, cache: LayerCache, rows: Rows, *, context: int
    ) -> tuple[jax.Array, LayerCache]:
        """Map [B, T, D] to [B, T, D], having written these tokens to the cache."""
        with jax.named_scope("attention"):
            heads = (*x.shape[:2], -1, self.config.head_dim)
            queries = self.q_proj(x).reshape(heads)
            keys = self.k_proj(x).reshape(heads)
            if self.q_norm is not None and self.k_norm is not None:
                queries, keys = self.q_norm(queries), self.k_norm(keys)
            table = rows.rope[self.config.rope]
            news = (rotate(keys, table), self.v_proj(x).reshape(heads))
            cache = update_cache(cache, news, rows)
            mixed = attend(
                rotate(queries, table),
                read_slots(cache[0], rows.slots, context, x.dtype),
                read_slots(cache[1], rows.slots, context, x.dtype),
                rows.starts,
                scale=self.config.scale,
                window=self.config.window,
                sinks=None if self.sinks is None else self.sinks[...],
            )
            return self.o_proj(mixed.reshape(*x.shape[:2], -1)), cache


def _head_norm(
    config: ModelConfig, attention: AttentionConfig, numerics: Numerics
) -> RMSNorm | None:
    if not attention.qk_norm:
        return None
    return RMSNorm(
        attention.head_dim,
        eps=config.rms_norm_eps,
        numerics=numerics,
        offset=config.norm_offset,
    )
