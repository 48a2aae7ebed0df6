# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""The matrices of a layer as they are held: plain, or quantised to int8 or int4."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from pals.models.matmul import matmul_transposed
from pals.models.numerics import Numerics
from pals.models.quantize import num_pairs
from pals.models.quantized import matmul_int4, matmul_int8

Tree = TypeVar("Tree")

QUANTIZED_LEAVES = frozenset({"values", "packed", "scales", "zeros"})
"""Parameters that together stand for one matrix ``weight``."""


class Int8Weight(nnx.Module):
    """Matrices [..., out, in] as `pals.models.quantize.Int8Matrix`, stacked or one."""

    def __init__(self, shape: tuple[int, ...], numerics: Numerics) -> None:
        self.values = nnx.Param(jnp.zeros(shape, jnp.int8))
        self.scales = nnx.Param(jnp.zeros(shape[:-1], jnp.float32))
        self.platform = numerics.platform
        self.quantize_activations = numerics.quantize_activations

    def multiply(self, x: jax.Array, expert: jax.Array | None = None) -> jax.Array:
        """Multiply rows [M, in] by the matrix, or that of one expert; float32 [M, out]."""
        leaves = (self.values[...], self.scales[...])
        values, scales = leaves if expert is None else take_expert(leaves, expert)
        return matmul_int8(
            x,
            values,
            scales,
            platform=self.platform,
            quantize_activations=self.quantize_activations,
        )


class Int4Weight(nnx.Module):
    """Matrices [..., out, in] as `pals.models.quantize.Int4Matrix`, stacked or one."""

    def __init__(self, shape: tuple[int, ...], numerics: Numerics) -> None:
        *stack, out_size, in_size = shape
        pairs = num_pairs(in_size, numerics.group_size)
        grid = (*stack, 2 * pairs, out_size)
        self.packed = nnx.Param(
            jnp.zeros((*stack, pairs, out_size, numerics.group_size), jnp.uint8)
        )
        self.scales = nnx.Param(jnp.zeros(grid, jnp.float32))
        self.zeros = nnx.Param(jnp.zeros(grid, jnp.int8))
        self.platform = numerics.platform

    def multiply(self, x: jax.Array, expert: jax.Array | None = None) -> jax.Array:
        """Multiply rows [M, in] by the matrix, or that of one expert; float32 [M, out]."""
        leaves = (self.packed[...], self.scales[...], self.zeros[...])
        packed, scales, zeros = leaves if expert is None else take_expert(leaves, expert)
        return matmul_int4(x, packed, scales, zeros, platform=self.platform)


Weight = nnx.Param[jax.Array] | Int8Weight | Int4Weight
"""One matrix [out, in], or a stack of them [E, out, in]."""


def make_weight(shape: tuple[int, ...], numerics: Numerics) -> Weight:
    """Return an empty matrix, or stack of them, in the numbers of ``numerics``."""
    match numerics.weights:
        case "int8":
            return Int8Weight(shape, numerics)
        case "int4":
            return Int4Weight(shape, numerics)
        case "plain":
            return nnx.Param(jnp.zeros(shape, numerics.compute))


def multiply(x: jax.Array, weight: Weight, expert: jax.Array | None = None) -> jax.Array:
    """Multiply rows [M, in] by a matrix [out, in], or by that of one expert of a stack.

    Returns:
        [M, out] in float32.
    """
    if isinstance(weight, Int8Weight | Int4Weight):
        return weight.multiply(x, expert)
    matrix = weight[...]
    return matmul_transposed(x, matrix if expert is None else take_expert(matrix, expert))


def take_expert(stacked: Tree, expert: jax.Array) -> Tree:
    """Take one expert's part of every array of a tree, [E, ...] each.

    The barrier ties the arrays to the loop that asks. Without it jax 0.10 moves the
    float32 form of a bf16 slice out of the loop, and writes out all experts in float32.
    """
    stacked, expert = lax.optimization_barrier((stacked, expert))

    def take(array: jax.Array) -> jax.Array:
        return lax.dynamic_index_in_dim(array, expert, keepdims=False)

    taken: Tree = jax.tree.map(take, stacked)
    return taken
