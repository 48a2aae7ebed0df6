"""Quantises matrices on the host, a block of rows at a time, and says what they stand for.

- int8: one scale for each output channel, symmetric, in a rotated basis of the columns
  (`rotation`).
- int4: a scale and a zero point for each group of 32, 64 or 128 columns of a row,
  asymmetric; the last group may be partial.

Rows are independent of each other, so that a matrix may be quantised in blocks. The
functions here are NumPy and exact to the bit; `pals.models.quantized` computes with the
result on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

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
    that a device reads the bytes of one pair of groups in one piece. Columns past ``in``
    have their group's zero point as code (scale 0 where the whole group is past it).

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
    hadamard: Float32 = np.ones((1, 1), np.float32)
    while hadamard.shape[0] < size:
        hadamard = np.kron(np.array([[1, 1], [1, -1]], np.float32), hadamard)
    return signs, hadamard * np.float32(size**-0.5)


def rotate(block: Float32) -> Float32:
    """Turn rows [R, in] of a matrix into the basis of `rotation`."""
    signs, hadamard = rotation(block.shape[1])
    turned = (block * signs).reshape(-1, hadamard.shape[0]) @ hadamard
    return turned.reshape(block.shape)


def unrotate(block: Float32) -> Float32:
    """Turn rows [R, in] back; `rotate` undone, but for rounding."""
    signs, hadamard = rotation(block.shape[1])
    turned = block.reshape(-1, hadamard.shape[0]) @ hadamard
    return turned.reshape(block.shape) * signs


def num_pairs(in_size: int, group_size: int) -> int:
    """Return how many pairs of groups cover ``in_size`` columns."""
    return -(-in_size // (2 * group_size))


def empty_int8(out_size: int, in_size: int) -> Int8Matrix:
    """Return a matrix to be filled by `write_int8`."""
    return Int8Matrix(np.empty((out_size, in_size), np.int8), np.empty(out_size, np.float32))


def empty_int4(out_size: int, in_size: int, group_size: int) -> Int4Matrix:
    """Return a matrix to be filled by `write_int4`."""
    pairs = num_pairs(in_size, group_size)
    return Int4Matrix(
        np.empty((pairs, out_size, group_size), np.uint8),
        np.empty((2 * pairs, out_size), np.float32),
        np.empty((2 * pairs, out_size), np.int8),
    )


def quantize_int8(matrix: Array) -> Int8Matrix:
    """Quantise a whole float matrix [out, in]; see `write_int8`."""
    target = empty_int8(matrix.shape[0], matrix.shape[1])
    write_int8(target, slice(0, matrix.shape[0]), matrix)
    return target


def quantize_int4(matrix: Array, group_size: int) -> Int4Matrix:
    """Quantise a whole float matrix [out, in]; see `write_int4`."""
    target = empty_int4(matrix.shape[0], matrix.shape[1], group_size)
    write_int4(target, slice(0, matrix.shape[0]), matrix)
    return target


def write_int8(target: Int8Matrix, rows: slice, block: Array) -> None:
    """Quantise ``block`` [R, in] of float32, float16 or bf16 into ``rows`` of ``target``.

    Raises:
        ValueError: The block holds infinities or NaN.
    """
    for part in _parts(block):
        wide = rotate(_finite(block[part]))
        scales = np.abs(wide).max(axis=1, initial=0) / np.float32(MAX_INT8)
        wide *= _inverse(scales)[:, None]
        values = np.rint(wide, out=wide).clip(-MAX_INT8, MAX_INT8)
        target.values[rows][part] = values
        target.scales[rows][part] = scales


def write_int4(target: Int4Matrix, rows: slice, block: Array) -> None:
    """Quantise ``block`` [R, in] of float32, float16 or bf16 into ``rows`` of ``target``.

    Raises:
        ValueError: The block holds infinities or NaN.
    """
    for part in _parts(block):
        groups = _grouped(_finite(block[part]), target.group_size)
        scales, zeros = _int4_grid(groups)
        groups *= _inverse(scales)[..., None]
        groups = np.rint(groups, out=groups)
        groups += zeros[..., None]
        codes = groups.clip(0, MAX_CODE).astype(np.uint8)
        first = rows.start + part.start
        _write_groups(target, slice(first, first + len(codes)), codes, scales, zeros)


def write_int4_codes(
    target: Int4Matrix, rows: slice, codes: UInt8, scales: Array, zeros: Array
) -> None:
    """Write what is quantised already, unchanged, into ``rows`` of ``target``.

    Args:
        target: Of the same group size as the source.
        rows: Rows that are filled.
        codes: [R, in] in [0, 15].
        scales: [R, G] for the ``G = ceil(in / group_size)`` groups of the source.
        zeros: [R, G] in [-112, 127].

    Raises:
        ValueError: A scale is not finite.
    """
    count, in_size = codes.shape
    groups = scales.shape[1]
    padded = target.packed.shape[0] * 2
    wide = np.zeros((count, padded), np.float32)
    wide[:, :groups] = _finite(scales)
    offsets = np.zeros((count, padded), np.int8)
    offsets[:, :groups] = zeros
    full = np.repeat(offsets.astype(np.uint8)[..., None], target.group_size, axis=2)
    full.reshape(count, -1)[:, :in_size] = codes
    _write_groups(target, rows, full, wide, offsets)


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
