# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""What a kernel computes, on any platform: some queries of one row over its row's pages.

The queries of a key head are those of all its G query heads, token by token. A kernel runs
once for each row, key head and tile of `Tile.size` queries, and reads nothing of a row but
the blocks that its tile sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pals.models.matmul import matmul_precision
from pals.models.walk import Sums, add_scores, empty_sums, mask

MIN_TILE = 16
"""Rows of the smallest matrix that the matrix units of GPUs take."""

ReadBlock = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""Returns keys [S, H] and values [S, W] of the block of a number."""


class Task(NamedTuple):
    """What is the same for every tile of a call.

    Attributes:
        groups: G, the query heads that share a key head.
        scale: What scores are multiplied by.
        window: Tokens that a query sees, itself included; None for all before it.
        tile: Queries of a tile.
    """

    groups: int
    scale: float
    window: int | None
    tile: int


class Tile(NamedTuple):
    """Where the queries of one tile stand.

    Attributes:
        start: The position of the row's first token.
        length: How many tokens of the row are no padding.
        first: The tile's first query, counted from the row's.
    """

    start: jax.Array
    length: jax.Array
    first: jax.Array


def seen_blocks(task: Task, tile: Tile, block_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Return the first block that a tile sees, and the one behind the last."""
    oldest = tile.start + tile.first // task.groups
    newest = tile.start + (tile.first + task.tile - 1) // task.groups
    # A row that only pads has no tokens and no blocks.
    tokens = jnp.where(tile.length > 0, jnp.minimum(tile.start + tile.length, newest + 1), 0)
    first = jnp.zeros((), jnp.int32)
    if task.window is not None:
        first = jnp.maximum(oldest - task.window + 1, 0) // block_tokens
    return first, pl.cdiv(tokens, block_tokens)


def sum_blocks(
    task: Task,
    tile: Tile,
    queries: jax.Array,
    blocks: tuple[jax.Array, jax.Array],
    read: ReadBlock,
    value_width: int,
) -> Sums:
    """Sum over some blocks what the queries [T, H] of a tile see there."""
    numbers = tile.first + lax.broadcasted_iota(jnp.int32, (task.tile, 1), 0)
    positions = tile.start + numbers // task.groups

    def add_block(number: jax.Array, sums: Sums) -> Sums:
        keys, values = read(number)
        size = keys.shape[0]
        columns = number * size + lax.broadcasted_iota(jnp.int32, (1, size), 1)
        scores = _multiply(queries, keys, contract=1) * task.scale
        scores = mask(scores, positions, columns, task.window)

        def mix(weights: jax.Array) -> jax.Array:
            return _multiply(weights.astype(values.dtype), values, contract=0)

        return add_scores(sums, scores, mix)

    summed: Sums = lax.fori_loop(*blocks, add_block, empty_sums((task.tile,), value_width))
    return summed


def _multiply(x: jax.Array, y: jax.Array, *, contract: int) -> jax.Array:
    """Multiply [T, _] by a matrix over its axis ``contract``, in float32."""
    return lax.dot_general(
        x,
        y,
        (((1,), (contract,)), ((), ())),
        precision=matmul_precision(y.dtype),
        preferred_element_type=jnp.float32,
    )
