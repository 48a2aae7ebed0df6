# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""Products of rows and plain matrices, formulated so that XLA's fast kernels are reached."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def matmul_precision(dtype: jnp.dtype) -> lax.Precision:
    """Return the precision that keeps float32 exact on devices that would round it."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


FEW_ROWS = 64
"""Up to so many rows, XLA on CPU is faster with the matrix on the left of the product."""


def matmul_transposed(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Multiply rows by a matrix in its checkpoint layout.

    Args:
        x: Rows [M, in].
        matrix: [out, in].

    Returns:
        [M, out] in float32.
    """
    if x.shape[0] > FEW_ROWS:
        return _contract(x, matrix)
    return lax.platform_dependent(x, matrix, cpu=_multiply_few, default=_contract)


def _multiply_few(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Multiply few rows on CPU, where XLA packs the right operand anew at each call.

    Packing a matrix takes longer than the product of up to some thirty rows, which are packed
    instead when they stand on the right (1.7 x faster).
    """
    rows = x.shape[0]
    if rows == 1:
        # XLA's CPU matrix-vector loop has no bf16 path and writes the whole matrix out in
        # float32 at each call; two rows reach its matrix-matrix kernels (10x faster).
        x = jnp.pad(x, ((0, 1), (0, 0)))
    # Without the barrier XLA exchanges the operands to save the transposition.
    return lax.optimization_barrier(_contract(matrix, x)).T[:rows]


def _contract(left: jax.Array, right: jax.Array) -> jax.Array:
    """Multiply [A, in] by [B, in]; returns [A, B] in float32."""
    return lax.dot_general(
        left,
        right,
        (((1,), (1,)), ((), ())),
        precision=matmul_precision(right.dtype),
        preferred_element_type=jnp.float32,
    )
