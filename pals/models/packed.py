"""Turns the bytes of quantised checkpoint formats into numbers, in NumPy.

- fp8: ``weight * scale`` for each block of rows and columns (DeepSeek-V3's
  inference/kernel.py, ``weight_dequant_kernel``).
- AWQ: AutoAWQ's utils/packing_utils.py and the kernel ``WQLinear_GEMM``.
- GPTQ: AutoGPTQ's and GPTQModel's torch linear; ``(code - zero) * scale`` in both.
- MXFP4: elements E2M1, one exponent E8M0 for 32 of them (OCP Microscaling Formats 1.0,
  sections 5.3.3 and 5.4.1; transformers: integrations/mxfp4.py).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
UInt8 = npt.NDArray[np.uint8]

WORD_BITS = 32

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column, of eight, that AWQ keeps in each four bits of a word, low bits first."""

E2M1_VALUES = np.array(
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0],
    ml_dtypes.bfloat16,
)

E8M0_BIAS = 127
E8M0_NAN = 255


def unpack_rows(words: Int32, bits: int) -> npt.NDArray[np.int16]:
    """Return codes [in, out] of words [in * bits / 32, out], low bits first."""
    codes = _codes(words, bits).transpose(0, 2, 1)
    return codes.reshape(-1, words.shape[1])


def unpack_columns(words: Int32, bits: int) -> npt.NDArray[np.int16]:
    """Return codes [R, out] of words [R, out * bits / 32], low bits first."""
    return _codes(words, bits).reshape(words.shape[0], -1)


def unpack_awq(words: Int32) -> npt.NDArray[np.int16]:
    """Return codes [R, out] of words [R, out / 8] in AWQ's order of columns."""
    codes = _codes(words, 4)
    return codes[..., np.argsort(AWQ_ORDER)].reshape(words.shape[0], -1)


def _codes(words: Int32, bits: int) -> npt.NDArray[np.int16]:
    """Return the codes [..., 32 / bits] of each word, low bits first."""
    shifts = np.arange(0, WORD_BITS, bits, dtype=np.uint32)
    return (words.view(np.uint32)[..., None] >> shifts & np.uint32((1 << bits) - 1)).astype(
        np.int16
    )


def scale_blocks(
    values: Array, scales: Float32, first_row: int, block_size: tuple[int, int]
) -> Float32:
    """Return rows [R, in] of fp8 values times the scales of their blocks.

    Args:
        values: Rows ``first_row`` on of the matrix.
        scales: [ceil(out / block rows), ceil(in / block columns)] of the whole matrix.
        first_row: Number of the first of these rows.
        block_size: Rows and columns of a block.
    """
    wide = values.astype(np.float32)
    last_row = first_row + wide.shape[0]
    of_rows = scales[[row // block_size[0] for row in range(first_row, last_row)]]
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks for what is not finite
        wide *= np.repeat(of_rows, block_size[1], axis=1)[:, : wide.shape[1]]
    return wide


def exponents_to_scales(exponents: UInt8) -> Float32:
    """Return the powers of two that E8M0 bytes stand for; NaN for 255."""
    scales = np.ldexp(np.float32(1), exponents.astype(np.int32) - E8M0_BIAS).astype(np.float32)
    return np.where(exponents == E8M0_NAN, np.float32(np.nan), scales)


def decode_mxfp4(blocks: UInt8, exponents: UInt8) -> Float32:
    """Return [..., 32 * n] of blocks [..., n, 16], low four bits first, and exponents [..., n]."""
    pairs = np.stack([blocks & 15, blocks >> 4], axis=-1)
    values = E2M1_VALUES[pairs].astype(np.float32)
    with np.errstate(over="ignore"):  # as above
        values = values.reshape(*blocks.shape[:-1], -1) * exponents_to_scales(exponents)[..., None]
    return values.reshape(*blocks.shape[:-2], -1)
