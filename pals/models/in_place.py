# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""Few rows by a matrix, or by one of a stack, whose numbers are widened as they are read.

XLA's products on processors without any of bf16 read a matrix at half the speed of memory, and
copy it first where it is one of a stack. Element-wise sums of several slices are no product: XLA
makes one loop of them, of the slices and of what widens them, which is as fast as memory.
"""

from __future__ import annotations

from functools import reduce
from operator import add

import jax
import jax.numpy as jnp
from jax import lax

from pals.models.processor import bf16_products

MOST_ROWS = 2
"""More rows are faster as sums over vectors of rows, see `pals.models.matmul.sum_products`."""

WIDTH = 32
"""Neighbouring columns that a part has: so many sums are independent of each other."""

FEWEST_PARTS, MOST_PARTS = 4, 15
"""How many parts are added to one before anything is written, which is then so much smaller.

XLA reads in one loop what up to fifteen operations ask for. Where there are more it may write the
bits of the whole matrix out first, as jax 0.12 does.
"""

BLOCK_BYTES = 2 << 20
"""Of sums that are written at a time, so that they are still in a cache when they are added up."""

DTYPES = frozenset(map(jnp.dtype, (jnp.bfloat16, jnp.int8)))


def reads_in_place(x: jax.Array, matrices: jax.Array) -> bool:
    """Whether `multiply_in_place` is fastest here for rows [M, in] and matrices [..., out, in]."""
    if jax.default_backend() != "cpu" or bf16_products() != "none":
        return False
    is_fast = x.shape[0] <= MOST_ROWS and matrices.dtype in DTYPES
    return is_fast and count_parts(matrices.shape[-1]) >= FEWEST_PARTS


def count_parts(in_size: int) -> int:
    """Return how many parts of `WIDTH` columns are added up; 0 where the columns do not divide."""
    units, rest = divmod(in_size, WIDTH)
    if rest:
        return 0
    return max(parts for parts in range(1, MOST_PARTS + 1) if units % parts == 0)


def multiply_in_place(x: jax.Array, matrices: jax.Array, number: jax.Array | int = 0) -> jax.Array:
    """Multiply rows by a matrix, some of its rows at a time.

    Args:
        x: [M, in].
        matrices: bf16 or int8 [out, in], or a stack of them [E, out, in], whose columns divide
            into parts, see `count_parts`.
        number: Which of the stack's.

    Returns:
        [M, out] in float32.
    """
    out_size, in_size = matrices.shape[-2:]
    parts = count_parts(in_size)
    columns = in_size // (parts * WIDTH), parts, WIDTH
    stacked = matrices.reshape(-1, *columns)
    rows = lax.optimization_barrier(x.astype(jnp.float32)).reshape(-1, *columns)
    size = min(out_size, max(1, BLOCK_BYTES * parts // (4 * rows.size)))

    def multiply(block: jax.Array, product: jax.Array) -> jax.Array:
        # The last block begins before its place where it would end beyond the matrix.
        start = jnp.minimum(block * size, out_size - size)
        sums = _isolated_sums(rows, stacked, number * out_size + start, size)
        done = jnp.sum(sums, axis=(2, 3))
        return lax.dynamic_update_slice_in_dim(product, done, start, axis=0)

    empty = jnp.zeros((out_size, x.shape[0]), jnp.float32)
    return lax.fori_loop(0, -(-out_size // size), multiply, empty).T


def _isolated_sums(rows: jax.Array, stacked: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Return `_sum_parts` of ``size`` rows of a matrix from ``start`` on, in a branch of its own.

    In the open XLA would join the loop to the last sum's, and that one reads copies of the slices.
    """

    def nothing(rows: jax.Array, stacked: jax.Array, start: jax.Array) -> jax.Array:
        return jnp.zeros((size, *rows.shape[:2], WIDTH), jnp.float32)

    def add_up(rows: jax.Array, stacked: jax.Array, start: jax.Array) -> jax.Array:
        return _sum_parts(rows, stacked, start, size)

    # True of all bits, which XLA does not find out.
    always = lax.bitcast_convert_type(rows[0, 0, 0, 0], jnp.int32) | 1 != 0
    sums: jax.Array = lax.cond(always, add_up, nothing, rows, stacked, start)
    return sums


def _sum_parts(rows: jax.Array, stacked: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Multiply rows [M, U, P, W] by some of [R, U, P, W] and add up the parts.

    Returns:
        [size, M, U, W] in float32.
    """
    _, units, parts, width = stacked.shape
    # A slice of bf16 itself would be written out in float32.
    is_bf16 = stacked.dtype == jnp.bfloat16
    numbers = lax.bitcast_convert_type(stacked, jnp.uint16) if is_bf16 else stacked

    def multiply(part: int) -> jax.Array:
        read = lax.dynamic_slice(numbers, (start, 0, part, 0), (size, units, 1, width))
        return _widen(read[:, None, :, 0]) * rows[None, :, :, part]

    return reduce(add, map(multiply, range(parts)))


def _widen(numbers: jax.Array) -> jax.Array:
    """Return float32 of int8, or of the bits of bf16."""
    if numbers.dtype == jnp.int8:
        return numbers.astype(jnp.float32)
    return lax.bitcast_convert_type(numbers.astype(jnp.uint32) << 16, jnp.float32)
