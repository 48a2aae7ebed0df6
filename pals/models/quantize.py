"""Quantises matrices on the host, a block of rows at a time, and says what they stand for.

- int8: one scale for each output channel, symmetric, in a rotated basis of the columns
  (`rotation`).
- int4: a scale and a zero point for each group of 32, 64 or 128 columns of a row,
  asymmetric; the last group may be partial.

Rows are independent of each other: blocks of rows, put together along the axis of
``out``, are the matrix. The functions here are NumPy and exact to the bit;
`pals.models.quantized` computes with the result on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pals.errors import CannotDivide

Array = npt.NDArray[np.generic]
Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]
UInt8 = npt.NDArray[np.uint8]

GROUP_SIZES = (32, 64, 128)

MAX_INT8 = 127
"""-128 is left out: the range is symmetric."""

MAX_CODE = 15
MIN_ZERO, MAX_ZERO = -112, 127
"""Zero points for which code minus zero point stays within [-127, 127]."""

MAX_ROTATION = 128
"""Columns that int8 mixes at most: what a block costs each row of activations."""

_BLOCK_VALUES = 1 << 18
"""Values that are quantised at a time: their temporaries stay within a processor's cache."""


class Int8Matrix(NamedTuple):
    """A matrix [out, in], rotated, whose row ``o`` stands for ``values[o] * scales[o]``.

    Attributes:
        values: [out, in] in [-127, 127].
        scales: [out], 0 for a row of zeros.
    """

    values: Int8
    scales: Float32


class Int4Matrix(NamedTuple):
    """A matrix [out, in] in codes of 4 bits: ``(code - zero) * scale``, group by group.

    With ``P`` pairs of groups, ``P = ceil(in / (2 * group_size))``. Groups come first, so
    that a device reads the bytes of one pair of groups in one piece. What stands past
    column ``in`` is multiplied by zeros.

    Attributes:
        packed: [P, out, group_size]; byte ``j`` of pair ``p`` holds column ``j`` of group
            ``2p`` in its low bits and of group ``2p + 1`` in its high bits.
        scales: [2P, out]. float32, which holds the float16 scales of AWQ and GPTQ
            checkpoints and any source's range; at groups of 128 it costs 0.25 bits a weight.
        zeros: [2P, out] in [-112, 127].
    """

    packed: UInt8
    scales: Float32
    zeros: Int8

    @property
    def group_size(self) -> int:
        return self.packed.shape[2]


@cache
def rotation(in_size: int) -> tuple[Float32, Float32]:
    """Return the orthogonal change of basis of an int8 matrix and of what it multiplies.

    A row, of the matrix or of activations, has its signs changed and each block of 2 ** n
    columns multiplied by a Hadamard matrix. It leaves products as they are and spreads
    outliers over the block, which rows of int8 activations cannot do without
    (https://arxiv.org/abs/2404.00456).

    Returns:
        Signs [in], and the symmetric orthogonal matrix [block, block] of the largest block
        that divides ``in_size``.
    """
    columns = np.arange(in_size, dtype=np.uint64)
    mixed = (columns + np.uint64(1)) * np.uint64(2654435761) >> np.uint64(16)
    signs = np.where(mixed & np.uint64(1), np.float32(-1), np.float32(1))
    size = min(in_size & -in_size, MAX_ROTATION)
    hadamard = np.ones((1, 1), np.float32)
    while hadamard.shape[0] < size:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    return signs, (hadamard * np.float32(size**-0.5)).astype(np.float32)


def rotate(block: Float32) -> Float32:
    """Turn rows [R, in] of a matrix into the basis of `rotation`."""
    signs, hadamard = rotation(block.shape[1])
    return _mix(block * signs, hadamard.shape[0])


def unrotate(block: Float32) -> Float32:
    """Turn rows [R, in] back; `rotate` undone, but for rounding."""
    signs, hadamard = rotation(block.shape[1])
    return _mix(block, hadamard.shape[0]) * signs


def _mix(block: Float32, size: int) -> Float32:
    """Multiply each ``size`` columns by a Hadamard matrix, in sums and differences of pairs.

    A product of matrices rounds otherwise on each processor, and on some for each number of
    rows: here a row becomes the same on all machines, in blocks of any size.
    """
    rows, half = block.reshape(-1, size), size // 2
    for _ in range(half.bit_length()):
        mixed = np.empty_like(rows)
        np.add(rows[:, :half], rows[:, half:], out=mixed[:, 0::2])
        np.subtract(rows[:, :half], rows[:, half:], out=mixed[:, 1::2])
        rows = mixed
    return (rows * np.float32(size**-0.5)).reshape(block.shape)


def check_rotation_divides(in_size: int, devices: int) -> None:
    """Raise unless devices can share the columns of int8 matrices, in whole rotated blocks.

    Raises:
        CannotDivide: They cannot.
    """
    block = rotation(in_size)[1].shape[0]
    if in_size % (block * devices):
        raise CannotDivide(
            count=in_size // block,
            what=f"blocks of {block} columns that int8 rotates together",
            devices=devices,
            advice="choose fewer devices, or another `--dtype`",
        )


def check_groups_divide(in_size: int, group_size: int, devices: int) -> None:
    """Raise unless devices can share the columns of int4 matrices, in whole pairs of groups.

    Raises:
        CannotDivide: They cannot.
    """
    if devices > 1 and in_size % (2 * group_size * devices):
        raise CannotDivide(
            count=in_size,
            what=f"columns, of which int4 packs {2 * group_size} together,",
            devices=devices,
            advice="choose fewer devices, a smaller `--group-size`, or another `--dtype`",
        )


def num_pairs(in_size: int, group_size: int) -> int:
    """Return how many pairs of groups cover ``in_size`` columns."""
    return -(-in_size // (2 * group_size))


def quantize_int8(block: Array) -> Int8Matrix:
    """Quantise rows [R, in] of float32, float16 or bf16.

    Raises:
        ValueError: The block holds infinities or NaN.
    """
    values = np.empty(block.shape, np.int8)
    scales = np.empty(block.shape[0], np.float32)
    for part in _parts(block):
        wide = rotate(_finite(block[part]))
        scales[part] = np.abs(wide).max(axis=1, initial=0) / np.float32(MAX_INT8)
        wide *= _inverse(scales[part])[:, None]
        values[part] = np.rint(wide, out=wide).clip(-MAX_INT8, MAX_INT8)
    return Int8Matrix(values, scales)


def quantize_int4(block: Array, group_size: int) -> Int4Matrix:
    """Quantise rows [R, in] of float32, float16 or bf16.

    Raises:
        ValueError: The block holds infinities or NaN.
    """
    target = _empty_int4(block.shape[0], block.shape[1], group_size)
    for part in _parts(block):
        groups = _grouped(_finite(block[part]), group_size)
        scales, zeros = _int4_grid(groups)
        groups *= _inverse(scales)[..., None]
        groups = np.rint(groups, out=groups)
        groups += zeros[..., None]
        codes = groups.clip(0, MAX_CODE).astype(np.uint8)
        _write_groups(target, part, codes, scales, zeros)
    return target


def pack_int4(
    codes: UInt8, scales: Array, zeros: npt.NDArray[np.int16], group_size: int
) -> Int4Matrix:
    """Take over rows that are quantised already, unchanged.

    Args:
        codes: [R, in] in [0, 15].
        scales: [R, G] for the ``G = ceil(in / group_size)`` groups.
        zeros: [R, G] integers in [-112, 127].
        group_size: Columns of a group.

    Raises:
        ValueError: A scale is not finite.
    """
    rows, in_size = codes.shape
    target = _empty_int4(rows, in_size, group_size)
    padding = (0, 0), (0, target.scales.shape[0] - scales.shape[1])
    groups = np.zeros((rows, target.scales.shape[0], group_size), np.uint8)
    groups.reshape(rows, -1)[:, :in_size] = codes
    wide, offsets = np.pad(_finite(scales), padding), np.pad(zeros, padding).astype(np.int8)
    _write_groups(target, slice(0, rows), groups, wide, offsets)
    return target


def dequantize_int8(matrix: Int8Matrix) -> Float32:
    """Return what the matrix stands for in its rotated basis, [out, in]."""
    return matrix.values.astype(np.float32) * matrix.scales[:, None]


def dequantize_int4(matrix: Int4Matrix, in_size: int) -> Float32:
    """Return what the matrix stands for, [out, in_size]."""
    pairs, out_size, group_size = matrix.packed.shape
    codes = np.stack([matrix.packed & MAX_CODE, matrix.packed >> 4], axis=1)
    codes = codes.reshape(2 * pairs, out_size, group_size).astype(np.float32)
    values = (codes - matrix.zeros[..., None]) * matrix.scales[..., None]
    return np.ascontiguousarray(values.transpose(1, 0, 2).reshape(out_size, -1)[:, :in_size])


def _empty_int4(rows: int, in_size: int, group_size: int) -> Int4Matrix:
    pairs = num_pairs(in_size, group_size)
    return Int4Matrix(
        np.empty((pairs, rows, group_size), np.uint8),
        np.empty((2 * pairs, rows), np.float32),
        np.empty((2 * pairs, rows), np.int8),
    )


def _parts(block: Array) -> Iterator[slice]:
    step = max(1, _BLOCK_VALUES // max(1, block.shape[1]))
    for start in range(0, block.shape[0], step):
        yield slice(start, min(start + step, block.shape[0]))


def _finite(block: Array) -> Float32:
    """Return a float32 copy of ``block``."""
    wide = np.array(block, np.float32)
    if not np.isfinite(wide).all():
        raise ValueError("infinities or NaN")
    return wide


def _inverse(scales: Float32) -> Float32:
    """Return ``1 / scales``, and 0 where it would not be finite: such a row counts as zero."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scales
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _grouped(wide: Float32, group_size: int) -> Float32:
    """Return rows as [R, 2P, group_size]; a partial group repeats the last column."""
    padded = num_pairs(wide.shape[1], group_size) * 2 * group_size
    wide = np.pad(wide, ((0, 0), (0, padded - wide.shape[1])), mode="edge")
    return wide.reshape(wide.shape[0], -1, group_size)


def _int4_grid(groups: Float32) -> tuple[Float32, Int8]:
    """Return scales and zero points [R, 2P] whose 16 steps span each group.

    A group that lies far from 0 gets steps that are coarse enough for its zero point.
    """
    low = groups.min(axis=2)
    high = groups.max(axis=2)
    farthest = np.maximum(np.abs(low), np.abs(high)) / np.float32(-MIN_ZERO)
    scales = np.maximum(high / MAX_CODE - low / MAX_CODE, farthest)
    zeros = np.rint(-low * _inverse(scales)).clip(MIN_ZERO, MAX_ZERO)
    return scales, zeros.astype(np.int8)


def _write_groups(
    target: Int4Matrix, rows: slice, codes: UInt8, scales: Float32, zeros: Int8
) -> None:
    """Pack codes [R, 2P, group_size] and write them with their grid [R, 2P]."""
    target.packed[:, rows] = (codes[:, 0::2] | codes[:, 1::2] << 4).transpose(1, 0, 2)
    target.scales[:, rows] = scales.T
    target.zeros[:, rows] = zeros.T
