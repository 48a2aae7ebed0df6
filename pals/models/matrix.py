# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""The matrices of a layer as they are held: plain, or quantised to int8 or int4."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from pals.models.in_place import multiply_in_place, reads_in_place
from pals.models.matmul import matmul_transposed
from pals.models.numerics import Numerics
from pals.models.quantize import check_groups_divide, check_rotation_divides, num_pairs
from pals.models.quantized import matmul_int4, matmul_int8, rotate
from pals.models.spread import Split

Tree = TypeVar("Tree")

QUANTIZED_LEAVES = frozenset({"values", "packed", "scales", "zeros"})
"""Parameters that together stand for one matrix ``weight``."""


class Int8Weight(nnx.Module):
    """Matrices [..., out, in] as `pals.models.quantize.Int8Matrix`, stacked or one."""

    def __init__(self, shape: tuple[int, ...], numerics: Numerics, split: Split | None) -> None:
        self.parts = numerics.devices if split == "inputs" else 1
        check_rotation_divides(shape[-1], self.parts)
        axis = _axis(split, outputs=-2, inputs=-1)
        self.values = nnx.Param(jnp.zeros(shape, jnp.int8), split_axis=axis)
        axis = _axis(split, outputs=-1)
        self.scales = nnx.Param(jnp.zeros(shape[:-1], jnp.float32), split_axis=axis)
        self.platform = numerics.platform
        self.quantize_activations = numerics.quantize_activations

    def multiply(self, x: jax.Array, expert: jax.Array | None = None) -> jax.Array:
        """Multiply rows [M, in] by the matrix, or that of one expert; float32 [M, out]."""
        leaves = (self.values[...], self.scales[...])
        if expert is not None and self.platform == "cpu" and reads_in_place(x, leaves[0]):
            product = multiply_in_place(rotate(x, self.parts), leaves[0], expert)
            return product * take_expert(leaves[1], expert)
        values, scales = leaves if expert is None else take_expert(leaves, expert)
        return matmul_int8(
            x,
            values,
            scales,
            platform=self.platform,
            quantize_activations=self.quantize_activations,
            parts=self.parts,
        )


class Int4Weight(nnx.Module):
    """Matrices [..., out, in] as `pals.models.quantize.Int4Matrix`, stacked or one."""

    def __init__(self, shape: tuple[int, ...], numerics: Numerics, split: Split | None) -> None:
        *stack, out_size, in_size = shape
        group_size = numerics.group_size
        check_groups_divide(in_size, group_size, numerics.devices if split == "inputs" else 1)
        pairs = num_pairs(in_size, group_size)
        packed, grid = (*stack, pairs, out_size, group_size), (*stack, 2 * pairs, out_size)
        axis = _axis(split, outputs=-2, inputs=-3)
        self.packed = nnx.Param(jnp.zeros(packed, jnp.uint8), split_axis=axis)
        axis = _axis(split, outputs=-1, inputs=-2)
        self.scales = nnx.Param(jnp.zeros(grid, jnp.float32), split_axis=axis)
        self.zeros = nnx.Param(jnp.zeros(grid, jnp.int8), split_axis=axis)
        self.platform = numerics.platform

    def multiply(self, x: jax.Array, expert: jax.Array | None = None) -> jax.Array:
        """Multiply rows [M, in] by the matrix, or that of one expert; float32 [M, out]."""
        leaves = (self.packed[...], self.scales[...], self.zeros[...])
        packed, scales, zeros = leaves if expert is None else take_expert(leaves, expert)
        return matmul_int4(x, packed, scales, zeros, platform=self.platform)


Weight = nnx.Param[jax.Array] | Int8Weight | Int4Weight
"""One matrix [out, in], or a stack of them [E, out, in]."""


def make_weight(shape: tuple[int, ...], numerics: Numerics, split: Split | None = None) -> Weight:
    """Return an empty matrix, or stack of them, in the numbers of ``numerics``.

    Args:
        shape: [out, in], or [E, out, in].
        numerics: Its devices are those that a split divides it among.
        split: What is divided; None where each device has all of it. Devices that divide
            the inputs each have a part of every product, and the sum is the product.

    Raises:
        CannotDivide: Columns that are quantised together would lie on two devices.
    """
    match numerics.weights:
        case "int8":
            return Int8Weight(shape, numerics, split)
        case "int4":
            return Int4Weight(shape, numerics, split)
        case "plain":
            axis = _axis(split, outputs=-2, inputs=-1)
            return nnx.Param(jnp.zeros(shape, numerics.compute), split_axis=axis)


def _axis(split: Split | None, *, outputs: int, inputs: int | None = None) -> int | None:
    """Return the axis on which a leaf is split; stacks of experts are on their first."""
    match split:
        case "experts":
            return 0
        case "outputs":
            return outputs
        case "inputs":
            return inputs
        case None:
            return None


def multiply(x: jax.Array, weight: Weight, expert: jax.Array | None = None) -> jax.Array:
    """Multiply rows [M, in] by a matrix [out, in], or by that of one expert of a stack.

    Returns:
        [M, out] in float32.
    """
    if isinstance(weight, Int8Weight | Int4Weight):
        return weight.multiply(x, expert)
    matrix = weight[...]
    if expert is None:
        return matmul_transposed(x, matrix)
    if not reads_in_place(x, matrix):
        return _multiply_taken(x, matrix, expert)
    product: jax.Array = lax.platform_dependent(
        x, matrix, expert, cpu=multiply_in_place, default=_multiply_taken
    )
    return product


def _multiply_taken(x: jax.Array, stack: jax.Array, expert: jax.Array) -> jax.Array:
    return matmul_transposed(x, take_expert(stack, expert))


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
