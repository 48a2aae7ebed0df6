"""Turns tiny checkpoints into quantised formats, written from the formats' definitions.

Each format gives two checkpoints of the same numbers: one that stores them quantised, and
one that stores in float32 what they stand for.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from pals.models.safetensors import read_header
from tests.checkpoints import write_weights

Tensors = dict[str, np.ndarray]

GROUP_SIZE = 32
FP8_BLOCK = (48, 40)  # divides no matrix's sizes
FP8_MAX = 448.0
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to store matrices.

    Attributes:
        config: The table ``quantization_config``.
        encode: From a matrix [out, in] to its tensors by part, and what they stand for.
    """

    config: dict[str, object]
    encode: Callable[[np.ndarray], tuple[Tensors, np.ndarray]]


def rewrite(source: Path, stored: Path, plain: Path, chosen: Format) -> None:
    """Write the model of ``source`` in a format, and dequantised as float32."""
    tensors = {n: e.read() for n, e in read_header(source / "model.safetensors").items()}
    config = json.loads((source / "config.json").read_text())
    quantized: Tensors = {}
    floats: Tensors = {}
    for name, array in tensors.items():
        if name.endswith("_proj.weight"):
            parts, floats[name] = chosen.encode(array)
            quantized |= {f"{name.removesuffix('weight')}{p}": a for p, a in parts.items()}
        else:
            quantized[name] = floats[name] = array
    for folder, weights, more in (
        (stored, quantized, {"quantization_config": chosen.config}),
        (plain, floats, {}),
    ):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | more))
        for text in ("tokenizer.json", "tokenizer_config.json"):
            (folder / text).write_bytes((source / text).read_bytes())
        write_weights(folder, weights)


def encode_fp8(matrix: np.ndarray) -> tuple[Tensors, np.ndarray]:
    rows, columns = FP8_BLOCK
    out_size, in_size = matrix.shape
    scales = np.zeros((-(-out_size // rows), -(-in_size // columns)), np.float32)
    values = np.zeros(matrix.shape, ml_dtypes.float8_e4m3fn)
    plain = np.zeros(matrix.shape, np.float32)
    for i, j in np.ndindex(scales.shape):
        block = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        scales[i, j] = np.abs(matrix[block]).max() / FP8_MAX
        values[block] = matrix[block] / scales[i, j]
        plain[block] = values[block].astype(np.float32) * scales[i, j]
    return {"weight": values, "weight_scale_inv": scales}, plain


def encode_awq(matrix: np.ndarray) -> tuple[Tensors, np.ndarray]:
    groups = np.arange(matrix.shape[1]) // GROUP_SIZE
    codes, zeros, scales, plain = quantize_by_groups(matrix, groups, lowest_zero=0)
    tensors = {"qweight": pack_awq(codes.T), "qzeros": pack_awq(zeros), "scales": scales}
    return tensors, plain


def encode_gptq(
    matrix: np.ndarray, *, zero_offset: int, act_order: bool
) -> tuple[Tensors, np.ndarray]:
    groups = np.arange(matrix.shape[1]) // GROUP_SIZE
    if act_order:
        groups = np.random.default_rng(0).permutation(groups)
    codes, zeros, scales, plain = quantize_by_groups(matrix, groups, lowest_zero=zero_offset)
    tensors = {
        "qweight": pack(codes.reshape(codes.shape[0], -1, 8)).T.copy(),
        "qzeros": pack((zeros - zero_offset).reshape(zeros.shape[0], -1, 8)),
        "scales": scales,
        "g_idx": groups.astype(np.int32),
    }
    return tensors, plain


def quantize_by_groups(
    matrix: np.ndarray, groups: np.ndarray, *, lowest_zero: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return codes [out, in], zeros [G, out], float16 scales [G, out], and the values."""
    count, out_size = int(groups.max()) + 1, matrix.shape[0]
    codes = np.zeros(matrix.shape, np.int64)
    zeros = np.zeros((count, out_size), np.int64)
    scales = np.zeros((count, out_size), np.float16)
    plain = np.zeros(matrix.shape, np.float32)
    for group in range(count):
        columns = groups == group
        part = matrix[:, columns]
        low, high = part.min(axis=1), part.max(axis=1)
        scales[group] = (high - low) / 15
        scale = scales[group].astype(np.float32)
        zeros[group] = np.rint(-low / scale).clip(lowest_zero, 15)
        steps = np.rint(part / scale[:, None]) + zeros[group][:, None]
        codes[:, columns] = steps.clip(0, 15)
        plain[:, columns] = (codes[:, columns] - zeros[group][:, None]) * scale[:, None]
    return codes, zeros, scales, plain


def pack(eights: np.ndarray) -> np.ndarray:
    """Pack [..., 8] codes of four bits into int32, the first in the lowest bits."""
    words = np.zeros(eights.shape[:-1], np.uint32)
    for place in range(8):
        words |= eights[..., place].astype(np.uint32) << np.uint32(4 * place)
    return words.view(np.int32)


def pack_awq(codes: np.ndarray) -> np.ndarray:
    """Pack [R, out] codes as AWQ does, eight neighbours of a row in a word."""
    return pack(codes.reshape(codes.shape[0], -1, 8)[..., AWQ_ORDER])


def gptq(*, version: int, act_order: bool) -> Format:
    zero_offset = 2 - version
    return Format(
        config={
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP_SIZE,
            "desc_act": act_order,
            "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        },
        encode=lambda matrix: encode_gptq(matrix, zero_offset=zero_offset, act_order=act_order),
    )


FP8 = Format(
    config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(FP8_BLOCK)},
    encode=encode_fp8,
)
AWQ = Format(
    config={"quant_method": "awq", "bits": 4, "group_size": GROUP_SIZE, "zero_point": True},
    encode=encode_awq,
)
FORMATS = {
    "fp8": FP8,
    "awq": AWQ,
    "gptq-v1": gptq(version=1, act_order=False),
    "gptq-v2": gptq(version=2, act_order=False),
    "gptq-act-order": gptq(version=1, act_order=True),
}
