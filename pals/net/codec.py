"""The int8 block codec: hidden states at little more than one byte an element.

Each token's elements are cut into blocks of `INT8_BLOCK`; a block is written as integers
of -127 to 127 and one scale, and an element is read back as integer times scale::

    token = integers (width) || scale (2) for each block, bfloat16 little-endian

The scale is the block's greatest magnitude / 127, rounded up to bfloat16, so that an
element is off by at most half a scale: 0.4 % of the greatest one beside it. A width that
is no multiple of the block leaves the last block short. A block with an element that is
not finite is read back as NaN whole, so that it is noticed and not hidden.

Pure functions over arrays, one call a frame.
"""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import numpy.typing as npt

from pals.net.wire import (
    INT8_BLOCK,
    NUMPY_DTYPES,
    Codec,
    Frame,
    FrameShape,
    Outgoing,
    buffer_of,
)

Float32 = npt.NDArray[np.float32]

_SMALLEST_SCALE = np.float32(2.0**-120)
"""Blocks of smaller elements are written as zeros; 1 / scale would overflow soon after."""


def encode(outgoing: Outgoing, shape: FrameShape) -> Outgoing:
    """Write the payload of a frame anew.

    Args:
        outgoing: Raw hidden states.
        shape: The same shape with the codec of the link.
    """
    if shape.codec is Codec.RAW:
        return outgoing
    raw = b"".join(outgoing.payload)
    values = np.frombuffer(raw, NUMPY_DTYPES[shape.dtype]).reshape(-1, shape.width)
    coded = encode_int8(values.astype(np.float32))
    return Outgoing(shape, outgoing.rows, (buffer_of(coded),))


def decode(frame: Frame) -> Frame:
    """Return the frame with raw hidden states.

    The size of the result follows from the row table, which has been checked before.
    """
    shape = frame.shape
    if shape.codec is Codec.RAW:
        return frame
    coded = np.frombuffer(frame.payload, np.uint8).reshape(-1, shape.token_bytes)
    values = decode_int8(coded, shape.width).astype(NUMPY_DTYPES[shape.dtype])
    raw = replace(shape, codec=Codec.RAW)
    return Frame(frame.lane, raw, frame.rows, buffer_of(values))


def encode_int8(values: Float32) -> npt.NDArray[np.uint8]:
    """Return ``uint8[T, width + 2 * blocks]`` of ``float32[T, width]``."""
    tokens, width = values.shape
    blocks = _blocks_of(values)
    greatest = np.abs(blocks).max(axis=2)
    scales = _round_up_to_bf16(greatest / np.float32(127))
    scales[scales < _SMALLEST_SCALE] = 0
    finite = np.isfinite(greatest)
    if not finite.all():
        scales[~finite] = np.nan
        blocks = np.where(finite[:, :, None], blocks, np.float32(0))
    inverse = np.float32(1) / np.where(scales > 0, scales, np.float32(np.inf))
    integers = np.rint(blocks * inverse[:, :, None]).astype(np.int8)
    written = scales.astype(ml_dtypes.bfloat16).view(np.uint8)
    return np.concatenate([integers.reshape(tokens, -1)[:, :width].view(np.uint8), written], axis=1)


def decode_int8(coded: npt.NDArray[np.uint8], width: int) -> Float32:
    """Return ``float32[T, width]`` of what `encode_int8` wrote.

    Bytes that it did not write give infinities or NaN at worst.
    """
    written = np.ascontiguousarray(coded[:, width:]).view(ml_dtypes.bfloat16)
    scales = written.astype(np.float32)
    blocks = _blocks_of(coded[:, :width].view(np.int8).astype(np.float32))
    with np.errstate(over="ignore", invalid="ignore"):
        values = blocks * scales[:, :, None]
    return values.reshape(len(coded), -1)[:, :width]


def _blocks_of(values: Float32) -> Float32:
    """Cut ``[T, width]`` into ``[T, blocks, INT8_BLOCK]``, the last one filled with zeros."""
    tokens, width = values.shape
    missing = -width % INT8_BLOCK
    if missing:
        values = np.pad(values, ((0, 0), (0, missing)))
    return values.reshape(tokens, -1, INT8_BLOCK)


def _round_up_to_bf16(values: Float32) -> Float32:
    """Return the smallest bfloat16 that is no smaller, for values of 0 and up or NaN."""
    bits = values.view(np.uint32) + np.uint32(0xFFFF)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)
