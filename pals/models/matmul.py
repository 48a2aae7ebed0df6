# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""Products of rows and plain matrices, formulated so that XLA's fast kernels are reached."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pals.models.processor import has_bf16_tiles


def matmul_precision(dtype: jnp.dtype) -> lax.Precision:
    """Return the precision that keeps float32 exact on devices that would round it."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


FEW_ROWS = 64
"""Up to so many rows of bf16 it is faster to have the matrix on the left, see `_multiply_left`."""


def matmul_transposed(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Multiply rows by a matrix in its checkpoint layout.

    Args:
        x: Rows [M, in].
        matrix: [out, in].

    Returns:
        [M, out] in float32.
    """
    rows = x.shape[0]
    if rows == 1:
        # XLA's CPU matrix-vector loop has no bf16 path and writes the whole matrix out in
        # float32 at each call; two rows reach its matrix-matrix kernels (10x faster).
        x = jnp.pad(x, ((0, 1), (0, 0)))
    if rows <= FEW_ROWS and matrix.dtype == jnp.bfloat16 and _is_best_on_the_left():
        product = lax.platform_dependent(x, matrix, cpu=_multiply_left, default=_contract)
    else:
        product = _contract(x, matrix)
    return product[:rows]


def _is_best_on_the_left() -> bool:
    # An accelerator's programs must not depend on the processor beside it.
    return jax.default_backend() == "cpu" and has_bf16_tiles()


def _multiply_left(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Multiply few rows with the matrix as the left operand of the product.

    XLA on CPU packs the right operand anew at each call, which takes longer for the matrix than
    the product does. But only a processor with tiles is fast with few columns on the right:
    others take twice as long as with the matrix there.
    """
    # Without the barrier XLA exchanges the operands to save the transposition.
    return lax.optimization_barrier(_contract(matrix, x)).T


def _contract(left: jax.Array, right: jax.Array) -> jax.Array:
    """Multiply [A, in] by [B, in]; returns [A, B] in float32."""
    return lax.dot_general(
        left,
        right,
        (((1,), (1,)), ((), ())),
        precision=matmul_precision(right.dtype),
        preferred_element_type=jnp.float32,
    )
