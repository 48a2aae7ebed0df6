# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""Attention over paged keys and values in plain XLA, row by row, a block of pages at a time.

The sums of a softmax are corrected as blocks come (Milakov and Gimelshein 2018,
https://arxiv.org/abs/1805.02867), so that a step takes time for the tokens that its rows
have and memory for one block of each row: one program serves contexts of any length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pals.models.matmul import matmul_precision
from pals.models.paged import LayerCache, Rows, Tables

DECODE_BLOCK_TOKENS = 64
CHUNK_BLOCK_TOKENS = 256
"""Tokens of a block, which page sizes divide: as few as possible where a block is read for a
token, and where it is read for a chunk as many as the processor's cache holds scores for."""

MASKED = -1e30
"""A score that weighs nothing; infinities would make NaN of rows that see nothing at all."""


AttendRows = Callable[[jax.Array, Tables], jax.Array]
"""Attends with [B, T, N, H], T tokens of each row; returns [B, T, N, W]."""


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


class Sums(NamedTuple):
    """The softmax of each query so far, all in float32.

    Attributes:
        most: [..., T G, 1], the largest score.
        total: [..., T G, 1], the sum of weights relative to it.
        mixed: [..., T G, W], the sum of weighted values.
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

    def by_blocks_of(block_tokens: int) -> AttendRows:
        return lambda queries, tables: _attend_rows(queries, cache, tables, view, block_tokens)

    return attend_parts(
        queries, rows, by_blocks_of(DECODE_BLOCK_TOKENS), by_blocks_of(CHUNK_BLOCK_TOKENS)
    )


def attend_parts(queries: jax.Array, rows: Rows, short: AttendRows, chunk: AttendRows) -> jax.Array:
    """Attend with the short rows of a step, and then with its chunk; as `attend`."""
    shape, tables = rows.shape, rows.tables
    split = shape.short_tokens
    parts: list[jax.Array] = []
    if split:
        own = Tables(*(table[: shape.rows] for table in tables))
        per_row = queries[:split].reshape(shape.rows, shape.row_tokens, *queries.shape[1:])
        mixed = short(per_row, own)
        parts.append(mixed.reshape(split, *mixed.shape[2:]))
    if shape.chunk_tokens:
        own = Tables(*(table[shape.rows :] for table in tables))
        parts.append(chunk(queries[split:][None], own)[0])
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _attend_rows(
    queries: jax.Array, cache: LayerCache, tables: Tables, view: View, block_tokens: int
) -> jax.Array:
    """Attend with [B, T, N, H], T tokens of each row, row by row; returns [B, T, N, W].

    XLA on CPU takes as long for the products of several rows as for one after another, and a
    row alone takes no time for the length of others.
    """

    def walk(row: tuple[jax.Array, Tables]) -> jax.Array:
        queries, tables = row
        return _attend_row(queries, cache, tables, view, block_tokens)

    if queries.shape[0] == 1:
        return walk((queries[0], Tables(*(table[0] for table in tables))))[None]
    walked: jax.Array = lax.map(walk, (queries, tables))
    return walked


def _attend_row(
    queries: jax.Array, cache: LayerCache, row: Tables, view: View, block_tokens: int
) -> jax.Array:
    """Attend with the tokens [T, N, H] of one row; returns [T, N, W]."""
    tokens, num_heads, _ = queries.shape
    num_kv_heads = cache[0].shape[0]
    grouped = queries.reshape(tokens, num_kv_heads, -1, queries.shape[-1]).swapaxes(0, 1)
    grouped = grouped.reshape(num_kv_heads, -1, queries.shape[-1])
    sums = _walk(grouped, cache, row, view, num_heads // num_kv_heads, block_tokens)
    mixed = normalise(sums, view, tokens).astype(queries.dtype)
    mixed = mixed.reshape(num_kv_heads, tokens, -1, mixed.shape[-1]).swapaxes(0, 1)
    return mixed.reshape(tokens, num_heads, -1)


def _walk(
    queries: jax.Array,
    cache: LayerCache,
    row: Tables,
    view: View,
    groups: int,
    block_tokens: int,
) -> Sums:
    """Sum over the blocks of a row that its queries [K, T G, H] see."""
    first = jnp.zeros((), jnp.int32)
    if view.window is not None:
        first = jnp.maximum(row.starts - view.window + 1, 0) // block_tokens
    # A row that only pads has no tokens and no blocks.
    end = jnp.where(row.lengths > 0, row.starts + row.lengths, 0)

    def add_block(number: jax.Array, sums: Sums) -> Sums:
        block = number * block_tokens
        return _add_block(queries, cache, row, block, sums, view, groups, block_tokens)

    width = cache[-1].shape[-1] if view.value_width is None else view.value_width
    walked: Sums = lax.fori_loop(
        first, -(-end // block_tokens), add_block, empty_sums(queries.shape[:-1], width)
    )
    return walked


def empty_sums(shape: tuple[int, ...], value_width: int) -> Sums:
    """Return the sums of queries [*shape, _] that have seen nothing yet."""
    return Sums(
        most=jnp.full((*shape, 1), MASKED, jnp.float32),
        total=jnp.zeros((*shape, 1), jnp.float32),
        mixed=jnp.zeros((*shape, value_width), jnp.float32),
    )


def _add_block(
    queries: jax.Array,
    cache: LayerCache,
    row: Tables,
    block: jax.Array,
    sums: Sums,
    view: View,
    groups: int,
    block_tokens: int,
) -> Sums:
    """Add to the sums of [K, T G, H] the block that begins at position ``block``."""
    keys, values = _read_block(cache, row.pages, block, block_tokens, queries.dtype, view)
    columns = block + jnp.arange(block_tokens, dtype=jnp.int32)
    ages = jnp.arange(queries.shape[1], dtype=jnp.int32) // groups
    positions = (row.starts + ages)[:, None]
    scores = batched_matmul(queries, keys, contract=2) * view.scale
    scores = mask(scores, positions, columns, view.window)

    def mix(weights: jax.Array) -> jax.Array:
        return batched_matmul(weights.astype(values.dtype), values, contract=1)

    return add_scores(sums, scores, mix)


def mask(
    scores: jax.Array, positions: jax.Array, columns: jax.Array, window: int | None
) -> jax.Array:
    """Hide from queries at ``positions`` [T G, 1] what they do not see of ``columns`` [S]."""
    visible = columns <= positions  # [T G, S]
    if window is not None:
        visible &= columns > positions - window
    return jnp.where(visible, scores, MASKED)


def add_scores(sums: Sums, scores: jax.Array, mix: Callable[[jax.Array], jax.Array]) -> Sums:
    """Add a block of scores [..., T G, S]; ``mix`` multiplies their weights by its values."""
    most = jnp.maximum(sums.most, jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - most)
    kept = jnp.exp(sums.most - most)
    total = sums.total * kept + jnp.sum(weights, axis=-1, keepdims=True)
    return Sums(most, total, sums.mixed * kept + mix(weights))


def _read_block(
    cache: LayerCache,
    pages: jax.Array,
    block: jax.Array,
    block_tokens: int,
    dtype: jnp.dtype,
    view: View,
) -> tuple[jax.Array, jax.Array]:
    """Return keys and values [K, S, _] of a block of a row whose pages are [N]."""
    page_tokens = cache[0].shape[2]
    numbers = block // page_tokens + jnp.arange(block_tokens // page_tokens)
    # A table may end within a block: what lies beyond is seen by no query.
    ids = pages[jnp.minimum(numbers, pages.shape[0] - 1)]
    read = [lax.bitcast_convert_type(_take_pages(array, ids), dtype) for array in cache]
    if view.value_width is not None:
        return read[0], read[0][..., : view.value_width]
    return read[0], read[1]


def _take_pages(array: jax.Array, ids: jax.Array) -> jax.Array:
    """Return the pages [n] of [K, P, p, W] one after another, [K, n p, W]."""
    heads, _, page_tokens, width = array.shape
    return array[:, ids].reshape(heads, ids.shape[0] * page_tokens, width)


def normalise(sums: Sums, view: View, tokens: int) -> jax.Array:
    """Return the weighted means [K, T G, W], with a sink of each head beside the weights."""
    if view.sinks is None:
        return sums.mixed / sums.total
    num_kv_heads = sums.total.shape[0]
    sinks = jnp.tile(view.sinks.astype(jnp.float32).reshape(num_kv_heads, 1, -1), (1, tokens, 1))
    sinks = sinks.reshape(num_kv_heads, -1, 1)
    most = jnp.maximum(sums.most, sinks)
    kept = jnp.exp(sums.most - most)
    return sums.mixed * kept / (sums.total * kept + jnp.exp(sinks - most))


def batched_matmul(x: jax.Array, y: jax.Array, *, contract: int) -> jax.Array:
    """Multiply [K, M, _] by [K, _, _] over y's axis ``contract``, in float32."""
    rows = x.shape[1]
    if rows == 1:
        x = jnp.pad(x, ((0, 0), (0, 1), (0, 0)))  # as in matmul_transposed
    product = lax.dot_general(
        x,
        y,
        (((2,), (contract,)), ((0,), (0,))),
        precision=matmul_precision(y.dtype),
        preferred_element_type=jnp.float32,
    )
    return product[:, :rows]
