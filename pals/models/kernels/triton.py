# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""The kernel as Triton compiles it for GPUs: pages are read where they lie."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pals.models.kernels.tile import Task, Tile, seen_blocks, sum_blocks
from pals.models.paged import LayerCache, Tables
from pals.models.walk import Sums

MAX_TILE = 64
WARPS = 4


def run_triton(
    task: Task, queries: jax.Array, cache: LayerCache, tables: Tables, *, interpret: bool
) -> Sums:
    """Attend with queries [B, K, T, H], whose tiles divide T, a page at a time."""
    batch, kv_heads, rows, width = queries.shape
    keys, values = cache

    def tiles(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, task.tile, width), lambda b, k, t: (b, k, t, 0))

    def pages(array: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, *array.shape[1:]), lambda b, k, t: (k, 0, 0, 0))

    widths = (1, 1, values.shape[-1])
    outputs = [jax.ShapeDtypeStruct((batch, kv_heads, rows, w), jnp.float32) for w in widths]
    run = pl.pallas_call(
        partial(_attend_tile, task),
        grid=(batch, kv_heads, rows // task.tile),
        in_specs=[*map(_whole, tables), tiles(width), pages(keys), pages(values)],
        out_specs=[tiles(w) for w in widths],
        out_shape=outputs,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=WARPS),
        name="paged_attention",
    )
    return Sums(*run(*tables, queries, keys, values))


def _attend_tile(
    task: Task,
    starts: jax.Array,
    lengths: jax.Array,
    pages: jax.Array,
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *outputs: jax.Array,
) -> None:
    """Write the sums of one tile; arguments are references of Pallas, indexed as arrays are."""
    row, number = pl.program_id(0), pl.program_id(2)
    tile = Tile(starts[row], lengths[row], number * task.tile)

    def read(block: jax.Array) -> tuple[jax.Array, jax.Array]:
        page = pages[row, block]
        return keys[page], values[page]

    blocks = seen_blocks(task, tile, keys.shape[1])
    sums = sum_blocks(task, tile, queries[...], blocks, read, values.shape[-1])
    for output, summed in zip(outputs, sums, strict=True):
        output[...] = summed


def _whole(array: jax.Array) -> pl.BlockSpec:
    """Return that every tile sees all of an array."""
    return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)
