# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""The kernel as Mosaic compiles it for TPUs: pages are copied from the device's memory.

The copies of one block run while the block before it is computed with.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pals.models.kernels.tile import Task, Tile, seen_blocks, sum_blocks
from pals.models.paged import LayerCache, Tables
from pals.models.walk import Sums

MAX_TILE = 128

BLOCK_TOKENS = 256
"""Tokens that are copied at a time, which page sizes divide."""


class _Copy(Protocol):
    """A copy between two of a TPU's memories; several may be under way."""

    def start(self) -> None: ...

    def wait(self) -> None: ...


def run_mosaic(
    task: Task, queries: jax.Array, cache: LayerCache, tables: Tables, *, interpret: bool
) -> Sums:
    """Attend with queries [B, K, T, H], whose tiles divide T, a block of pages at a time."""
    batch, kv_heads, rows, width = queries.shape
    keys, values = cache
    starts, lengths, pages = tables

    def tiles(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, task.tile, width), lambda b, k, t: (b, k, t, 0))

    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    own_pages = pl.BlockSpec(
        (None, 1, pages.shape[1]), lambda b, k, t: (b, 0, 0), memory_space=pltpu.SMEM
    )
    elsewhere = pl.BlockSpec(memory_space=pl.ANY)
    widths = (1, 1, values.shape[-1])
    outputs = [jax.ShapeDtypeStruct((batch, kv_heads, rows, w), jnp.float32) for w in widths]
    run = pl.pallas_call(
        partial(_attend_tile, task),
        grid=(batch, kv_heads, rows // task.tile),
        in_specs=[scalars, scalars, own_pages, tiles(width), elsewhere, elsewhere],
        out_specs=[tiles(w) for w in widths],
        out_shape=outputs,
        scratch_shapes=[
            pltpu.VMEM((2, BLOCK_TOKENS, array.shape[-1]), array.dtype) for array in cache
        ]
        + [pltpu.SemaphoreType.DMA((2,))],
        interpret=interpret,
        name="paged_attention",
    )
    return Sums(*run(starts, lengths, pages[:, None], queries, keys, values))


def _attend_tile(
    task: Task,
    starts: jax.Array,
    lengths: jax.Array,
    pages: jax.Array,
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *rest: jax.Array,
) -> None:
    """Write the sums of one tile; arguments are references of Pallas, indexed as arrays are."""
    *outputs, key_buffer, value_buffer, semaphores = rest
    row, head, number = (pl.program_id(axis) for axis in range(3))
    tile = Tile(starts[row], lengths[row], number * task.tile)
    first, end = seen_blocks(task, tile, BLOCK_TOKENS)
    page_tokens = keys.shape[2]

    def copies(block: jax.Array) -> Iterator[_Copy]:
        slot = block % 2
        for place in range(BLOCK_TOKENS // page_tokens):
            # A table may end within a block: what lies beyond is seen by no query.
            column = jnp.minimum(block * (BLOCK_TOKENS // page_tokens) + place, pages.shape[1] - 1)
            page, part = pages[0, column], pl.ds(place * page_tokens, page_tokens)
            for array, buffer in ((keys, key_buffer), (values, value_buffer)):
                source, target = array.at[head, page], buffer.at[slot, part]
                yield pltpu.make_async_copy(source, target, semaphores.at[slot])

    def start(block: jax.Array) -> None:
        for copy in copies(block):
            copy.start()

    def read(block: jax.Array) -> tuple[jax.Array, jax.Array]:
        pl.when(block + 1 < end)(lambda: start(block + 1))
        for copy in copies(block):
            copy.wait()
        return key_buffer[block % 2], value_buffer[block % 2]

    pl.when(first < end)(lambda: start(first))
    sums = sum_blocks(task, tile, queries[...], (first, end), read, values.shape[-1])
    for output, summed in zip(outputs, sums, strict=True):
        output[...] = summed
