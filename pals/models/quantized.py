# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""Multiplies by the matrices of `pals.models.quantize` on the device.

XLA on CPU multiplies int8 by int8 fast and nothing else of eight bits or less: a matrix
that is widened in the graph is written out at each call. So rows become int8 too, as one
plane or as two (`Planes`); two keep about 15 bits of each, at twice the multiplications,
which few rows do not notice: there the matrix's bytes take the time.

A row's result does not depend on the rows beside it, apart from how many they are: more than
`FEW_ROWS`, and more than `FEWEST_ROWS` of int8, may take the other formulation. Sums of
integers are exact: a dot product of up to 2 ** 17 columns fits int32.
"""

from __future__ import annotations

from operator import itemgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pals.models.in_place import multiply_in_place, reads_in_place
from pals.models.matmul import SUMS_ARE_FAST, sum_products
from pals.models.processor import bf16_products
from pals.models.quantize import MAX_CODE, MAX_INT8, rotation
from pals.models.spread import device_number

FEW_ROWS = 16
"""Up to so many rows, two planes cost about what one does (decode, short tails of prompts)."""

PACKED_ROWS = 32
"""Up to so many rows of integers, planes counted, it is faster to pack them than the matrix."""

FEWEST_ROWS = 2
"""More of them, up to `FEW_ROWS`, are faster as sums in float32 where those of bf16 are, too."""

UNPACKED_ROWS = 2 * FEWEST_ROWS
"""Up to so many rows of integers, such a processor is faster with the matrix packed."""

CHUNK_COLUMNS = 512
"""Columns of an int4 matrix that are widened at a time for many rows on CPU."""

LOW_STEPS = 2 * MAX_INT8
"""The high plane is off by at most half a step: the low one divides a step by this."""


class Planes(NamedTuple):
    """Rows as integers: ``(high + low / LOW_STEPS) * scale``.

    Attributes:
        high: int8 [..., M, in].
        low: int8 of the same shape, or None for one plane.
        scales: float32 [..., M, 1].
    """

    high: jax.Array
    low: jax.Array | None
    scales: jax.Array


def rotate(x: jax.Array, parts: int = 1) -> jax.Array:
    """Turn rows [M, in] into the basis of int8 matrices, in float32; see `rotation`.

    Args:
        x: The columns that this device has.
        parts: Devices that each have as many, one after another.
    """
    in_size = x.shape[1]
    signs, hadamard = rotation(in_size * parts)
    if parts > 1:
        signs = lax.dynamic_slice_in_dim(signs, device_number(parts) * in_size, in_size)
    size = hadamard.shape[0]
    blocks = (x.astype(jnp.float32) * signs).reshape(-1, size)
    turned = lax.dot_general(
        blocks, hadamard, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST
    )
    return turned.reshape(x.shape)


def split_planes(x: jax.Array, *, count: int) -> Planes:
    """Round float32 rows [..., M, in] to ``count`` planes, each row by its largest value."""
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scales = jnp.where(largest > 0, largest / MAX_INT8, 1.0)
    high = jnp.round(x / scales)
    if count == 1:
        return Planes(high.astype(jnp.int8), None, scales)
    low = jnp.round((x / scales - high) * LOW_STEPS)
    return Planes(high.astype(jnp.int8), low.astype(jnp.int8), scales)


def multiply_planes(rows: Planes, matrix: jax.Array) -> jax.Array:
    """Multiply planes [M, in] by an int8 matrix [out, in]; returns float32 [M, out].

    The result lacks the factor of the matrix's own scales.
    """
    count = rows.high.shape[0]
    if rows.low is not None:
        sums = _multiply_integers(jnp.concatenate([rows.high, rows.low]), matrix)
        sums = sums.astype(jnp.float32)
        return (sums[:count] + sums[count:] * (1 / LOW_STEPS)) * rows.scales
    # a single row would miss XLA's matrix kernels on CPU, see `matmul_transposed`
    padded = jnp.pad(rows.high, ((0, 1 if count == 1 else 0), (0, 0)))
    return _multiply_integers(padded, matrix)[:count].astype(jnp.float32) * rows.scales


def _multiply_integers(rows: jax.Array, matrix: jax.Array) -> jax.Array:
    """Multiply int8 rows [M, in] by [out, in] exactly; returns int32 [M, out]."""
    unpacked = UNPACKED_ROWS if _multiplies_no_bf16() else 0
    if not unpacked < rows.shape[0] <= PACKED_ROWS:
        return _contract(rows, matrix)
    # XLA on CPU packs the right operand anew at each call, and exchanges the two again to save
    # the transposition where there is no barrier.
    return lax.optimization_barrier(_contract(matrix, rows)).T


def _contract(left: jax.Array, right: jax.Array) -> jax.Array:
    return lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)


def matmul_int8(
    x: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    *,
    platform: str,
    quantize_activations: bool = True,
    parts: int = 1,
) -> jax.Array:
    """Multiply rows by an `Int8Matrix`, or by the columns of one that this device has.

    Args:
        x: [M, in] in the compute dtype.
        values: int8 [out, in].
        scales: float32 [out].
        platform: ``cpu``, ``gpu`` or ``tpu``.
        quantize_activations: On CPU, round many rows to int8 (one plane). Elsewhere rows
            keep the compute dtype always.
        parts: Devices that each have as many columns.

    Returns:
        float32 [M, out].
    """
    turned = rotate(x, parts)
    if platform != "cpu":
        return _multiply_widened(turned.astype(x.dtype), values) * scales
    if x.shape[0] > FEW_ROWS:
        planes = split_planes(turned, count=1 if quantize_activations else 2)
        return multiply_planes(planes, values) * scales
    return _multiply_few(turned, values, scales) * scales


def _multiply_few(x: jax.Array, values: jax.Array, scales: jax.Array) -> jax.Array:
    """Multiply few float32 rows [M, in] by [out, in] on CPU, without the matrix's scales."""
    if reads_in_place(x, values):
        return multiply_in_place(x, values)
    if x.shape[0] <= FEWEST_ROWS or not (_multiplies_no_bf16() and SUMS_ARE_FAST):
        return _multiply_two_planes(x, values)
    # The first branch is always taken: the loop has to be in one, see `sum_products`.
    first = jnp.isfinite(scales[0])
    products: jax.Array = lax.cond(first, sum_products, _multiply_two_planes, x, values)
    return products


def _multiply_two_planes(x: jax.Array, values: jax.Array) -> jax.Array:
    return multiply_planes(split_planes(x, count=2), values)


def _multiplies_no_bf16() -> bool:
    return bf16_products() == "none"


def matmul_int4(
    x: jax.Array, packed: jax.Array, scales: jax.Array, zeros: jax.Array, *, platform: str
) -> jax.Array:
    """Multiply rows by an `Int4Matrix`.

    On CPU, few rows become two planes, scaled group by group; for many, the matrix is
    widened to the compute dtype a few groups at a time. Activations are never rounded to
    int8.

    Args:
        x: [M, in] in the compute dtype.
        packed: uint8 [P, out, group_size].
        scales: float32 [2P, out].
        zeros: int8 [2P, out].
        platform: ``cpu``, ``gpu`` or ``tpu``.

    Returns:
        float32 [M, out].
    """
    if platform != "cpu":
        matrix = dequantize_int4(packed, scales, zeros, in_size=x.shape[1])
        return _multiply_widened(x, matrix)
    pairs, _, group_size = packed.shape
    rows = x.shape[0]
    padding = pairs * 2 * group_size - x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, padding))).reshape(rows, pairs, 2, group_size)
    grid = scales.reshape(pairs, 2, -1), zeros.reshape(pairs, 2, -1)
    multiply = _multiply_groups if rows <= FEW_ROWS else _multiply_chunks
    return multiply(x, packed, *grid)


def _multiply_groups(
    x: jax.Array, packed: jax.Array, scales: jax.Array, zeros: jax.Array
) -> jax.Array:
    """Multiply rows [M, P, 2, g] in integers, a pair of groups at a time."""
    rows = split_planes(x.astype(jnp.float32).transpose(1, 2, 0, 3), count=2)

    def add(
        total: jax.Array, pair: tuple[Planes, jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        rows, packed, scales, zeros = pair
        for half, codes in enumerate(_unpack(packed)):
            group = jax.tree.map(itemgetter(half), rows)
            matrix = codes.astype(jnp.int8) - zeros[half][:, None]
            total = total + multiply_planes(group, matrix) * scales[half]
        return total, None

    total = _first_sum(x, packed.shape[1])
    return lax.scan(add, total, (rows, packed, scales, zeros))[0]


def _multiply_chunks(
    x: jax.Array, packed: jax.Array, scales: jax.Array, zeros: jax.Array
) -> jax.Array:
    """Multiply rows [M, P, 2, g] in their own dtype, some pairs of groups at a time."""
    rows, pairs, _, size = x.shape
    out_size = packed.shape[1]
    count = _chunk_pairs(pairs, size)

    def chunks(array: jax.Array) -> jax.Array:
        return array.reshape(pairs // count, count, *array.shape[1:])

    def add(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        x, packed, scales, zeros = chunk
        for half, codes in enumerate(_unpack(packed)):
            matrix = _widen(codes, scales[:, half], zeros[:, half]).astype(x.dtype)
            matrix = matrix.transpose(1, 0, 2).reshape(out_size, count * size)
            part = x[:, half].transpose(1, 0, 2).reshape(rows, count * size)
            total = total + _multiply_widened(part, matrix)
        return total, None

    total = _first_sum(x, out_size)
    parts = (x.transpose(1, 2, 0, 3), packed, scales, zeros)
    return lax.scan(add, total, tuple(map(chunks, parts)))[0]


def _first_sum(x: jax.Array, out_size: int) -> jax.Array:
    """Return zeros [M, out] that take their time from rows [M, P, 2, g].

    Plain zeros depend on nothing: XLA on CPU makes those of every layer's loops at the start
    of a program and keeps them until they are used, 40 MiB a layer in prefill of an 8B model.
    A row that begins with NaN has it in every product anyway.
    """
    first = x[:, :1, 0, 0].astype(jnp.float32)
    return jnp.broadcast_to(jnp.where(jnp.isnan(first), first, 0), (x.shape[0], out_size))


def _chunk_pairs(pairs: int, group_size: int) -> int:
    """Return how many of the pairs of groups are widened at a time; it divides ``pairs``."""
    most = max(1, CHUNK_COLUMNS // group_size)
    return max(count for count in range(1, most + 1) if pairs % count == 0)


def dequantize_int8(values: jax.Array, scales: jax.Array) -> jax.Array:
    """Return float32 [out, in], bit for bit `quantize.dequantize_int8`."""
    return values.astype(jnp.float32) * scales[:, None]


def dequantize_int4(
    packed: jax.Array, scales: jax.Array, zeros: jax.Array, *, in_size: int
) -> jax.Array:
    """Return float32 [out, in_size], bit for bit `quantize.dequantize_int4`."""
    pairs, out_size, group_size = packed.shape
    codes = jnp.stack(_unpack(packed), axis=1).reshape(2 * pairs, out_size, group_size)
    values = _widen(codes, scales, zeros)
    return values.transpose(1, 0, 2).reshape(out_size, -1)[:, :in_size]


def _unpack(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    return packed & MAX_CODE, packed >> 4


def _widen(codes: jax.Array, scales: jax.Array, zeros: jax.Array) -> jax.Array:
    """Return float32 [G, out, g] of codes [G, out, g] and a grid [G, out]."""
    steps = codes.astype(jnp.int8) - zeros[..., None]
    return steps.astype(jnp.float32) * scales[..., None]


def _multiply_widened(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Multiply rows [M, in] by [out, in], which the compiler widens as it reads."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        x,
        matrix.astype(x.dtype),
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
