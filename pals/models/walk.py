# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""Attention over paged keys and values in plain XLA, a block of pages at a time.

The sums of a softmax are corrected as blocks come (Milakov and Gimelshein 2018,
https://arxiv.org/abs/1805.02867), so that a step takes time for the tokens that its rows
have and memory for one block of each row: one program serves contexts of any length.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pals.models.matmul import matmul_precision
from pals.models.paged import LayerCache, Rows, Tables

DECODE_BLOCK_TOKENS = 128
CHUNK_BLOCK_TOKENS = 512

FEWER_ROWS = 4
"""While the rows that still have blocks are as many times fewer, blocks are read for those."""

MASKED = -1e30
"""A score that weighs nothing; infinities would make NaN of rows that see nothing at all."""


class View(NamedTuple):
    """What a layer's attention sees.

    Attributes:
        scale: What scores are multiplied by.
        window: Tokens that a query sees, itself included; None for all before it.
        sinks: [N], logits that take part in the softmax and lead to nothing
            (https://arxiv.org/abs/2309.17453); None without.
        value_width: Of each head, when values are the first part of keys (latent attention);
            None where they are an array of their own.
    """

    scale: float
    window: int | None = None
    sinks: jax.Array | None = None
    value_width: int | None = None


class _Sums(NamedTuple):
    """The softmax of each query so far, all in float32.

    Attributes:
        most: [B, K, T G, 1], the largest score.
        total: [B, K, T G, 1], the sum of weights relative to it.
        mixed: [B, K, T G, W], the sum of weighted values.
    """

    most: jax.Array
    total: jax.Array
    mixed: jax.Array


def attend(queries: jax.Array, cache: LayerCache, rows: Rows, view: View) -> jax.Array:
    """Causal grouped-query attention (https://arxiv.org/abs/2305.13245) of a step's rows.

    Args:
        queries: [M, N, H], already turned.
        cache: Keys, then values unless they are a part of the keys; this step's included.
        rows: Of the step.
        view: Of the layer.

    Returns:
        [M, N, W].
    """
    shape, tables = rows.shape, rows.tables
    split = shape.short_tokens
    parts: list[jax.Array] = []
    if split:
        short = queries[:split].reshape(shape.rows, shape.row_tokens, *queries.shape[1:])
        own = Tables(*(table[: shape.rows] for table in tables))
        mixed = _attend_rows(short, cache, own, view, DECODE_BLOCK_TOKENS)
        parts.append(mixed.reshape(split, *mixed.shape[2:]))
    if shape.chunk_tokens:
        own = Tables(*(table[shape.rows :] for table in tables))
        parts.append(_attend_rows(queries[split:][None], cache, own, view, CHUNK_BLOCK_TOKENS)[0])
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _attend_rows(
    queries: jax.Array, cache: LayerCache, tables: Tables, view: View, block_tokens: int
) -> jax.Array:
    """Attend with [B, T, N, H], T tokens of each row; returns [B, T, N, W]."""
    batch, tokens, num_heads, _ = queries.shape
    num_kv_heads = cache[0].shape[1]
    groups = num_heads // num_kv_heads
    sums = _walk(_group(queries, num_kv_heads), cache, tables, view, groups, block_tokens)
    mixed = _normalise(sums, view, tokens).astype(queries.dtype)
    mixed = mixed.reshape(batch, num_kv_heads, tokens, groups, -1)
    return mixed.transpose(0, 2, 1, 3, 4).reshape(batch, tokens, num_heads, -1)


def _group(queries: jax.Array, num_kv_heads: int) -> jax.Array:
    """Return queries [B, T, N, H] by the key head that they read, [B, K, T G, H]."""
    batch, tokens, _, head_dim = queries.shape
    queries = queries.reshape(batch, tokens, num_kv_heads, -1, head_dim)
    return queries.transpose(0, 2, 1, 3, 4).reshape(batch, num_kv_heads, -1, head_dim)


def _walk(
    queries: jax.Array,
    cache: LayerCache,
    tables: Tables,
    view: View,
    groups: int,
    block_tokens: int,
) -> _Sums:
    """Sum over the blocks of all rows, one block of each row at a time.

    Rows come with the longest first (`pals.engine.shard`), so that those which still have
    blocks are the first ones.
    """
    ends = tables.starts + tables.lengths
    first = jnp.zeros_like(ends)
    if view.window is not None:
        first = jnp.maximum(tables.starts - view.window + 1, 0) // block_tokens
    counts = jnp.where(tables.lengths > 0, -(-ends // block_tokens) - first, 0)
    batch = queries.shape[0]
    widths = walk_widths(batch)

    def add_block(column: jax.Array, sums: _Sums) -> _Sums:
        def add(width: int) -> _Sums:
            few = Tables(*(table[:width] for table in tables))
            block = (first[:width] + column) * block_tokens
            part = _Sums(*(sum_[:width] for sum_ in sums))
            part = _add_block(queries[:width], cache, few, block, part, view, groups, block_tokens)
            return _Sums(*(a.at[:width].set(b) for a, b in zip(sums, part, strict=True)))

        if len(widths) == 1:
            return add(batch)
        needed = jnp.max(jnp.where(counts > column, jnp.arange(batch) + 1, 0))
        choice = jnp.sum(needed <= jnp.array(widths)) - 1
        summed: _Sums = lax.switch(choice, [lambda w=width: add(w) for width in widths])
        return summed

    empty = _empty_sums(
        queries, cache[-1].shape[-1] if view.value_width is None else view.value_width
    )
    walked: _Sums = lax.fori_loop(0, jnp.max(counts), add_block, empty)
    return walked


def walk_widths(batch: int) -> list[int]:
    """Return how many rows a block may be read for, largest first."""
    widths = [batch]
    while widths[-1] > FEWER_ROWS:
        widths.append(max(2, widths[-1] // FEWER_ROWS))
    return widths


def _empty_sums(queries: jax.Array, value_width: int) -> _Sums:
    shape = queries.shape[:3]
    return _Sums(
        most=jnp.full((*shape, 1), MASKED, jnp.float32),
        total=jnp.zeros((*shape, 1), jnp.float32),
        mixed=jnp.zeros((*shape, value_width), jnp.float32),
    )


def _add_block(
    queries: jax.Array,
    cache: LayerCache,
    tables: Tables,
    block: jax.Array,
    sums: _Sums,
    view: View,
    groups: int,
    block_tokens: int,
) -> _Sums:
    """Add to the sums of [B, K, T G, H] the block of each row that begins at ``block`` [B]."""
    keys, values = _read_block(cache, tables.pages, block, block_tokens, queries.dtype, view)
    columns = block[:, None] + jnp.arange(block_tokens, dtype=jnp.int32)
    # The page's former session may have left infinities, which a weight of 0 would not undo.
    written = columns < (tables.starts + tables.lengths)[:, None]
    values = jnp.where(written[:, None, :, None], values, 0)

    scores = batched_matmul(queries, keys, contract=3) * view.scale
    ages = jnp.arange(queries.shape[2], dtype=jnp.int32) // groups
    positions = (tables.starts[:, None] + ages)[:, :, None]
    visible = columns[:, None] <= positions
    if view.window is not None:
        visible &= columns[:, None] > positions - view.window
    scores = jnp.where(visible[:, None], scores, MASKED)

    most = jnp.maximum(sums.most, jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - most)
    kept = jnp.exp(sums.most - most)
    mixed = batched_matmul(weights.astype(values.dtype), values, contract=2)
    total = sums.total * kept + jnp.sum(weights, axis=-1, keepdims=True)
    return _Sums(most, total, sums.mixed * kept + mixed)


def _read_block(
    cache: LayerCache,
    pages: jax.Array,
    block: jax.Array,
    block_tokens: int,
    dtype: jnp.dtype,
    view: View,
) -> tuple[jax.Array, jax.Array]:
    """Return keys and values [B, K, S, _] of the block of each row."""
    page_tokens = cache[0].shape[2]
    numbers = block[:, None] // page_tokens + jnp.arange(block_tokens // page_tokens)
    ids = jnp.take_along_axis(pages, jnp.minimum(numbers, pages.shape[1] - 1), axis=1)
    read = [lax.bitcast_convert_type(_take_pages(array, ids), dtype) for array in cache]
    if view.value_width is not None:
        return read[0], read[0][..., : view.value_width]
    return read[0], read[1]


def _take_pages(array: jax.Array, ids: jax.Array) -> jax.Array:
    """Return the pages [B, n] of [P, K, p, W] side by side, [B, K, n p, W]."""
    batch, count = ids.shape
    _, heads, page_tokens, width = array.shape
    taken = array[ids].swapaxes(1, 2)
    return taken.reshape(batch, heads, count * page_tokens, width)


def _normalise(sums: _Sums, view: View, tokens: int) -> jax.Array:
    """Return the weighted means, with a sink of each head [N] beside the weights."""
    if view.sinks is None:
        return sums.mixed / sums.total
    batch, num_kv_heads, rows, _ = sums.total.shape
    sink = jnp.tile(view.sinks.astype(jnp.float32).reshape(num_kv_heads, 1, -1), (1, tokens, 1))
    sink = jnp.broadcast_to(sink.reshape(1, num_kv_heads, rows, 1), (batch, num_kv_heads, rows, 1))
    most = jnp.maximum(sums.most, sink)
    kept = jnp.exp(sums.most - most)
    return sums.mixed * kept / (sums.total * kept + jnp.exp(sink - most))


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
