# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""Products of rows and plain matrices, formulated so that XLA's fast kernels are reached."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pals.models.in_place import multiply_in_place, reads_in_place
from pals.models.processor import bf16_products


def matmul_precision(dtype: jnp.dtype) -> lax.Precision:
    """Return the precision that keeps float32 exact on devices that would round it."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


FEW_ROWS = 64
"""Up to so many rows of bf16 a processor with tiles is fast with the matrix on the left."""

SUMMED_ROWS = 32
"""Up to so many, one without any products of bf16 is faster than with the matrix widened."""

SUMS_ARE_FAST = jax.__version_info__ < (0, 12)
"""XLA's loop for the sums of several rows takes twice as long since, its products less."""

WIDENED_BYTES = 4 << 20
"""Of a matrix in float32 that are made at a time, so that they are still in a cache when read."""


def matmul_transposed(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Multiply rows by a matrix in its checkpoint layout.

    Args:
        x: Rows [M, in].
        matrix: [out, in].

    Returns:
        [M, out] in float32.
    """
    if matrix.dtype != jnp.bfloat16 or jax.default_backend() != "cpu":
        # An accelerator's programs must not depend on the processor beside it.
        return _multiply(x, matrix)
    on_cpu = multiply_in_place if reads_in_place(x, matrix) else _way_on_cpu(x.shape[0])
    product: jax.Array = lax.platform_dependent(x, matrix, cpu=on_cpu, default=_multiply)
    return product


def _way_on_cpu(rows: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return what is fastest with so many rows of bf16 on this machine's processor."""
    match bf16_products():
        case "tiles":
            return _multiply_left if rows <= FEW_ROWS else _multiply
        case "none" if rows > SUMMED_ROWS:
            return _multiply_widened
        case "none":
            return _multiply_summed if rows == 1 or SUMS_ARE_FAST else _multiply_left
        case "vectors" | "unknown":
            return _multiply


def _multiply(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Multiply as XLA is fastest by itself."""
    return _contract(_pad(x), matrix)[: x.shape[0]]


def _multiply_left(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Multiply few rows with the matrix as the left operand of the product.

    XLA on CPU packs the right operand anew at each call, which takes longer for the matrix than
    the product does. But only a processor with tiles is fast with few columns on the right, before
    jax 0.12: others take twice as long as with the matrix there.
    """
    # Without the barrier XLA exchanges the operands to save the transposition.
    return lax.optimization_barrier(_contract(matrix, _pad(x))).T[: x.shape[0]]


def _multiply_summed(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Multiply few rows in a loop of sums, since XLA's product packs the matrix at each call."""
    # The first branch is always taken: the loop has to be in one.
    product: jax.Array = lax.cond(jnp.isfinite(x[0, 0]), sum_products, _multiply, x, matrix)
    return product


def sum_products(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Multiply few rows [M, in] by [out, in] of any dtype as a sum over the inputs, in float32.

    XLA makes one loop of it, which widens numbers as it reads them, over vectors of rows or of
    the inputs of one row. Outside of a branch of its own XLA makes one loop of several products,
    and writes out the rows once for each row of a matrix where two have the same size.
    """
    if x.shape[0] == 1:
        row = lax.optimization_barrier(_widen(x))
        return jnp.sum(_widen(matrix) * row, axis=1)[None]
    columns = lax.optimization_barrier(_widen(x).T)
    return jnp.sum(_widen(matrix)[:, :, None] * columns[None], axis=1).T


def _multiply_widened(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Multiply many rows in float32, some of the matrix's rows at a time."""
    out_size, in_size = matrix.shape
    size = min(out_size, max(1, WIDENED_BYTES // (4 * in_size)))
    wide = _widen(x)

    def multiply(number: jax.Array, columns: jax.Array) -> jax.Array:
        # Without the barrier the whole matrix is widened before the loop. The last slice
        # begins before its place where it would end beyond the matrix; so does its result.
        rows, start = lax.optimization_barrier((matrix, number * size))
        part = _widen(lax.dynamic_slice_in_dim(rows, start, size))
        return lax.dynamic_update_slice_in_dim(columns, _contract(part, wide), start, axis=0)

    empty = jnp.zeros((out_size, x.shape[0]), jnp.float32)
    return lax.fori_loop(0, -(-out_size // size), multiply, empty).T


def _pad(x: jax.Array) -> jax.Array:
    """Return two rows instead of one, for which no product of XLA on CPU is a fast one.

    Its matrix-vector loop has no bf16 path and writes the whole matrix out in float32 at each
    call; two rows reach its matrix-matrix kernels (10x faster).
    """
    return jnp.pad(x, ((0, 1), (0, 0))) if x.shape[0] == 1 else x


def _widen(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _contract(left: jax.Array, right: jax.Array) -> jax.Array:
    """Multiply [A, in] by [B, in]; returns [A, B] in float32."""
    return lax.dot_general(
        left,
        right,
        (((1,), (1,)), ((), ())),
        precision=matmul_precision(right.dtype),
        preferred_element_type=jnp.float32,
    )
