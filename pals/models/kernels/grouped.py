# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""Rows through the matrix of their own group, by the kernel for TPUs that comes with jax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox import gmm

ROWS = 128
"""Of a tile, which groups share."""

COLUMNS = 512
"""Of a tile of a matrix, in both directions."""


def multiply_groups(
    x: jax.Array, matrices: jax.Array, group_sizes: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Multiply sorted rows [P, in] by their group's matrix of [E, out, in].

    Args:
        x: In bf16.
        matrices: In bf16; those of empty groups are not read.
        group_sizes: [E] int32; rows behind the last group come out undefined.
        interpret: Compute it with XLA operations, on any platform.

    Returns:
        [P, out] in float32.
    """
    count = x.shape[0]
    _, out_size, in_size = matrices.shape
    product: jax.Array = gmm(
        jnp.pad(x, ((0, -count % ROWS), (0, 0))),
        matrices,
        group_sizes,
        preferred_element_type=jnp.float32,
        tiling=(ROWS, min(COLUMNS, in_size), min(COLUMNS, out_size)),
        transpose_rhs=True,
        interpret=interpret,
    )
    return product[:count]
