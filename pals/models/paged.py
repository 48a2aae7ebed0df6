# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""The paged cache of one layer: where a step's tokens stand in it, and how they are written.

A step holds short rows of a few tokens each, of as many sessions, and at most one chunk of
a prompt. All of its tokens stand in one flat array, short rows first and the chunk last, so
that every matrix is read once for all of them; only attention looks at rows.

On CPU the cache holds bf16 as its 16 bits: XLA would otherwise widen the whole cache to
float32 and back for each token it writes (2 x slower for one row, 10 x for four).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pals.models.config import ModelConfig
from pals.models.rope import RopeTable, make_table

LayerCache = tuple[jax.Array, ...]
"""What one layer keeps of each token: arrays [K, P, p, W] in their storage dtype.

Page 0 is nobody's: rows and columns that only pad write there.
"""


class StepShape(NamedTuple):
    """The padded sizes of a step.

    Attributes:
        rows: Short rows.
        row_tokens: Tokens of each short row.
        chunk_tokens: Of the chunk; 0 where there is none.
    """

    rows: int
    row_tokens: int = 1
    chunk_tokens: int = 0

    @property
    def short_tokens(self) -> int:
        """Tokens of all short rows."""
        return self.rows * self.row_tokens

    @property
    def tokens(self) -> int:
        """All tokens, M."""
        return self.short_tokens + self.chunk_tokens

    @property
    def batch(self) -> int:
        """Rows of all kinds, B."""
        return self.rows + bool(self.chunk_tokens)


class Tables(NamedTuple):
    """Which pages a step's rows have, and what of them the step writes.

    Attributes:
        starts: [B] int32, the position of each row's first token.
        lengths: [B] int32, how many tokens of each row are no padding.
        pages: [B, N] int32, the page that holds each row's n-th p tokens.
    """

    starts: jax.Array
    lengths: jax.Array
    pages: jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("tables", "counted", "rope"),
    meta_fields=("shape",),
)
@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Where the tokens of a step stand.

    Attributes:
        tables: Of the rows.
        counted: [M] booleans, False for padding.
        rope: One table for each entry of `ModelConfig.rope`.
        shape: How the tokens are divided into rows.
    """

    tables: Tables
    counted: jax.Array
    rope: tuple[RopeTable, ...]
    shape: StepShape = field(metadata={"static": True})


def make_rows(config: ModelConfig, shape: StepShape, tables: Tables) -> Rows:
    """Return the rows of a step."""
    offsets = _offsets(shape)
    of_row = _rows_of_tokens(shape)
    positions = tables.starts[of_row] + offsets
    return Rows(
        tables=tables,
        counted=offsets < tables.lengths[of_row],
        rope=tuple(make_table(rope, positions) for rope in config.rope),
        shape=shape,
    )


def lone_row(tokens: int, start: jax.Array | int, num_pages: int) -> tuple[StepShape, Tables]:
    """Return a step of one sequence that has a cache for itself, outside of the engine.

    Args:
        tokens: That the step takes.
        start: Where the first of them stands.
        num_pages: Of the cache; all but the scratch page are the sequence's.
    """
    shape = StepShape(1) if tokens == 1 else StepShape(0, 1, tokens)
    pages = jnp.arange(1, num_pages, dtype=jnp.int32)[None]
    lengths = jnp.array([tokens], jnp.int32)
    return shape, Tables(jnp.asarray(start, jnp.int32).reshape(1), lengths, pages)


def _offsets(shape: StepShape) -> jax.Array:
    """Return where in its row each token stands, [M]."""
    short = jnp.tile(jnp.arange(shape.row_tokens, dtype=jnp.int32), shape.rows)
    return jnp.concatenate([short, jnp.arange(shape.chunk_tokens, dtype=jnp.int32)])


def _rows_of_tokens(shape: StepShape) -> jax.Array:
    """Return the row of each token, [M]."""
    short = jnp.repeat(jnp.arange(shape.rows, dtype=jnp.int32), shape.row_tokens)
    chunk = jnp.full(shape.chunk_tokens, shape.rows, jnp.int32)
    return jnp.concatenate([short, chunk])


def storage_dtype(dtype: jnp.dtype, platform: str) -> jnp.dtype:
    """Return the dtype in which the cache holds values of ``dtype`` on a platform."""
    return jnp.dtype(jnp.uint16) if dtype == jnp.bfloat16 and platform == "cpu" else dtype


def update_cache(
    cache: LayerCache, news: Sequence[jax.Array], rows: Rows, platform: str
) -> LayerCache:
    """Write what is new, [M, K, W] for each array, to the pages of its rows, on a platform.

    What is not finite is written as 0: it is of a session that is lost already, and must not
    reach the page's next one, where even a weight of 0 would not undo it.
    """
    finite = (jnp.where(jnp.isfinite(new), new, 0) for new in news)
    stored = tuple(lax.bitcast_convert_type(new, cache[0].dtype) for new in finite)
    split = rows.shape.short_tokens
    if split:
        write = _merge_token if platform == "tpu" else _place_token
        cache = _write_tokens(cache, tuple(new[:split] for new in stored), rows, write)
    if rows.shape.chunk_tokens:
        cache = _write_chunk(cache, tuple(new[split:] for new in stored), rows.tables)
    # Without the barrier XLA on CPU copies the updated cache into attention's operands.
    settled: LayerCache = lax.optimization_barrier(cache)
    return settled


WriteToken = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""Writes to an array, at a page and a place in it, one token [K, W]."""


def _write_tokens(
    cache: LayerCache, news: LayerCache, rows: Rows, write_token: WriteToken
) -> LayerCache:
    """Write the tokens of short rows [R Q, K, W], each to its place."""
    page_tokens, width = cache[0].shape[2], rows.shape.row_tokens
    starts, lengths, pages = rows.tables

    def write(token: jax.Array, arrays: LayerCache) -> LayerCache:
        row, place = token // width, token % width
        position = starts[row] + place
        page = jnp.where(place < lengths[row], pages[row, position // page_tokens], 0)
        return tuple(
            write_token(array, page, position % page_tokens, new[token])
            for array, new in zip(arrays, news, strict=True)
        )

    written: LayerCache = lax.fori_loop(0, news[0].shape[0], write, cache)
    return written


def _place_token(array: jax.Array, page: jax.Array, place: jax.Array, new: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice(array, new[:, None, None], (0, page, place, 0))


def _merge_token(array: jax.Array, page: jax.Array, place: jax.Array, new: jax.Array) -> jax.Array:
    """Write a token by writing its whole page.

    XLA on TPU would turn the heads of a cache inwards to write single tokens: it copies the
    whole cache before the first one and back after the last.
    """
    is_new = (jnp.arange(array.shape[2], dtype=jnp.int32) == place)[:, None]
    old = lax.dynamic_slice_in_dim(array, page, 1, axis=1)
    merged = jnp.where(is_new, new[:, None, None], old)
    return lax.dynamic_update_slice_in_dim(array, merged, page, axis=1)


def _write_chunk(cache: LayerCache, news: LayerCache, tables: Tables) -> LayerCache:
    """Write a chunk [C, K, W] a page at a time: its first and its last one keep their rest."""
    page_tokens, chunk_tokens = cache[0].shape[2], news[0].shape[0]
    start, length, pages = tables.starts[-1], tables.lengths[-1], tables.pages[-1]
    margin = ((page_tokens, page_tokens), (0, 0), (0, 0))
    padded = tuple(jnp.pad(new, margin) for new in news)

    def write(number: jax.Array, arrays: LayerCache) -> LayerCache:
        first = number * page_tokens - start % page_tokens  # of the chunk's tokens, in this page
        place = first + jnp.arange(page_tokens, dtype=jnp.int32)
        is_new = ((place >= 0) & (place < length))[:, None]
        # A table may end with the chunk; what lies beyond writes nothing, to nobody's page.
        page = jnp.where(jnp.any(is_new), pages[start // page_tokens + number], 0)
        return tuple(
            _merge_page(array, page, new, first + page_tokens, is_new)
            for array, new in zip(arrays, padded, strict=True)
        )

    count = -(-chunk_tokens // page_tokens) + 1
    written: LayerCache = lax.fori_loop(0, count, write, cache)
    return written


def _merge_page(
    array: jax.Array, page: jax.Array, news: jax.Array, first: jax.Array, is_new: jax.Array
) -> jax.Array:
    """Replace those tokens of a page that ``is_new`` [p, 1] marks by ``news`` from ``first`` on."""
    heads, _, page_tokens, width = array.shape
    old = lax.dynamic_slice(array, (0, page, 0, 0), (heads, 1, page_tokens, width))
    new = lax.dynamic_slice_in_dim(news, first, page_tokens).swapaxes(0, 1)[:, None]
    return lax.dynamic_update_slice(array, jnp.where(is_new, new, old), (0, page, 0, 0))
