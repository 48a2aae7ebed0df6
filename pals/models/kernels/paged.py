# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""Attention of a step's rows by a kernel; does what `pals.models.walk.attend` does."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pals.models.kernels import mosaic, triton
from pals.models.kernels.tile import MIN_TILE, Task
from pals.models.numerics import PallasKernel
from pals.models.paged import LayerCache, Rows, Tables
from pals.models.walk import Sums, View, attend_parts, normalise

RUN = {"triton": triton.run_triton, "mosaic": mosaic.run_mosaic}
MAX_TILE: dict[PallasKernel, int] = {"triton": triton.MAX_TILE, "mosaic": mosaic.MAX_TILE}


def attend_paged(
    queries: jax.Array,
    cache: LayerCache,
    rows: Rows,
    view: View,
    kernel: PallasKernel,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Causal grouped-query attention of a step's rows; see `pals.models.walk.attend`.

    Args:
        queries: [M, N, H], already turned.
        cache: Keys and values in the dtype of the queries; this step's included.
        rows: Of the step.
        view: Of the layer, whose values are an array of their own.
        kernel: For which platform it is compiled.
        interpret: Compute it with XLA operations, on any platform.

    Returns:
        [M, N, W].
    """
    run = partial(_attend_rows, cache, view, kernel, interpret)
    return attend_parts(queries, rows, run, run)


def _attend_rows(
    cache: LayerCache,
    view: View,
    kernel: PallasKernel,
    interpret: bool,
    queries: jax.Array,
    tables: Tables,
) -> jax.Array:
    """Attend with [B, T, N, H], T tokens of each row; returns [B, T, N, W]."""
    batch, tokens, num_heads, width = queries.shape
    kv_heads = cache[0].shape[0]
    grouped = queries.reshape(batch, tokens, kv_heads, -1, width).swapaxes(1, 2)
    grouped = grouped.reshape(batch, kv_heads, -1, width)
    count = grouped.shape[2]
    tile = min(max(MIN_TILE, pl.next_power_of_2(count)), MAX_TILE[kernel])
    padded = jnp.pad(grouped, ((0, 0), (0, 0), (0, -count % tile), (0, 0)))
    task = Task(num_heads // kv_heads, view.scale, view.window, tile)
    sums = RUN[kernel](task, padded, cache, tables, interpret=interpret)
    sums = Sums(*(array[:, :, :count] for array in sums))
    mixed = jax.vmap(partial(normalise, view=view, tokens=tokens))(sums).astype(queries.dtype)
    mixed = mixed.reshape(batch, kv_heads, tokens, -1, mixed.shape[-1]).swapaxes(1, 2)
    return mixed.reshape(batch, tokens, num_heads, -1)
