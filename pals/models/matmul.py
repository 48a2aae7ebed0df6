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
    product = lax.dot_general(
        x,
        matrix,
        (((1,), (1,)), ((), ())),
        precision=matmul_precision(matrix.dtype),
        preferred_element_type=jnp.float32,
    )
    return product[:rows]
