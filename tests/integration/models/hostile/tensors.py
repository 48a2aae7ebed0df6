"""Weights whose numbers, shapes or dtypes are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from tests import checkpoints
from tests.integration.models.hostile.cases import (
    Case,
    Spoil,
    config_with,
    corrupt,
    unsupported,
    weights_of_model,
)

UP = "model.layers.1.mlp.up_proj"
NORM = "model.norm.weight"
IN_SIZE, OUT_SIZE, GROUP_SIZE = 64, 96, 32
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP_SIZE}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP_SIZE}
Tensors = dict[str, np.ndarray]


def weights_with(
    changes: Tensors, *, without: str = "", quantization: dict[str, object] | None = None
) -> Spoil:
    """Replace and add tensors; every other one stays as it is."""

    def spoil(folder: Path) -> None:
        weights = {k: v for k, v in weights_of_model().items() if not without or k != without}
        write(folder / "model.safetensors", weights | changes)
        config_with(quantization_config=quantization)(folder)

    return spoil


def write(path: Path, tensors: Tensors) -> None:
    """Write a weight file in any dtype."""
    names = {
        np.dtype(np.int32): "I32",
        np.dtype(np.uint8): "U8",
        np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
        **checkpoints.DTYPE_NAMES,
    }
    header: dict[str, object] = {}
    offset = 0
    for name, array in tensors.items():
        offsets = [offset, offset + array.nbytes]
        header[name] = {
            "dtype": names[array.dtype], "shape": array.shape, "data_offsets": offsets,
        }  # fmt: skip
        offset += array.nbytes
    encoded = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def poisoned(name: str, value: float, dtype: type) -> Spoil:
    """Put one number into an otherwise sound tensor."""

    def spoil(folder: Path) -> None:
        array = weights_of_model()[name].astype(dtype)
        array.flat[-1] = value
        weights_with({name: array})(folder)

    return spoil


def fp8(**changes: np.ndarray) -> Tensors:
    parts: Tensors = {
        "weight": np.ones((OUT_SIZE, IN_SIZE), ml_dtypes.float8_e4m3fn),
        "weight_scale_inv": np.ones((3, 2), np.float32),
    }
    return {f"{UP}.{part}": array for part, array in (parts | changes).items()}


def awq(**changes: np.ndarray) -> Tensors:
    parts: Tensors = {
        "qweight": np.ones((IN_SIZE, OUT_SIZE // 8), np.int32),
        "qzeros": np.zeros((2, OUT_SIZE // 8), np.int32),
        "scales": np.ones((2, OUT_SIZE), np.float16),
    }
    return {f"{UP}.{part}": array for part, array in (parts | changes).items()}


def gptq(**changes: np.ndarray) -> Tensors:
    parts: Tensors = {
        "qweight": np.ones((IN_SIZE // 8, OUT_SIZE), np.int32),
        "qzeros": np.zeros((2, OUT_SIZE // 8), np.int32),
        "scales": np.ones((2, OUT_SIZE), np.float16),
        "g_idx": np.arange(IN_SIZE, dtype=np.int32) // GROUP_SIZE,
    }
    return {f"{UP}.{part}": array for part, array in (parts | changes).items()}


def quantized(tensors: Tensors, quantization: dict[str, object], *, without: str = "") -> Spoil:
    """Replace one matrix by its quantised form, of which a part may be missing."""

    def spoil(folder: Path) -> None:
        kept = {name: array for name, array in tensors.items() if not name.endswith(without or "@")}
        missing = "" if f"{UP}.weight" in kept else f"{UP}.weight"
        weights_with(kept, without=missing, quantization=quantization)(folder)

    return spoil


def scales(value: float, dtype: type = np.float16) -> np.ndarray:
    array = np.ones((2, OUT_SIZE), dtype)
    array[-1, -1] = value
    return array


def with_last(array: np.ndarray, value: float) -> np.ndarray:
    array.flat[-1] = value
    return array


SOUND: dict[str, Spoil] = {
    "fp8": quantized(fp8(), FP8),
    "awq": quantized(awq(), AWQ),
    "gptq": quantized(gptq(), GPTQ),
    "gptq_in_order": quantized(gptq(), GPTQ, without="g_idx"),
}
"""Quantised folders that load, so that the spoilt ones fail for what was spoilt."""

NUMBER_CASES: dict[str, Case] = {
    f"{name}_{np.dtype(dtype).name}_{tensor.split('.')[-2]}_{held}": corrupt(
        poisoned(tensor, value, dtype), tensor, "infinities or NaN", dtype=held
    )
    for name, value in {"nan": np.nan, "infinity": np.inf, "minus_infinity": -np.inf}.items()
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16)
    for tensor, held in [
        (NORM, "f32"),
        ("model.embed_tokens.weight", "bf16"),
        (f"{UP}.weight", "int8"),
        (f"{UP}.weight", "int4"),
    ]
} | {
    "overflow_of_bf16": corrupt(
        poisoned(f"{UP}.weight", 3.4e38, np.float32), UP, "infinities or NaN", dtype="bf16"
    ),
}

FORMAT_CASES: dict[str, Case] = {
    "fp8_nan": corrupt(
        quantized(fp8(weight=with_last(fp8()[f"{UP}.weight"], np.nan)), FP8), UP, "NaN"
    ),
    "fp8_scale_nan": corrupt(
        quantized(fp8(weight_scale_inv=with_last(np.ones((3, 2), np.float32), np.nan)), FP8),
        UP,
        "NaN",
    ),
    "fp8_scale_infinite": corrupt(
        quantized(fp8(weight_scale_inv=with_last(np.ones((3, 2), np.float32), np.inf)), FP8),
        UP,
        "infinities",
        dtype="int8",
    ),
    "fp8_scale_missing": unsupported(quantized(fp8(), FP8, without="scale_inv"), UP, "F8_E4M3"),
    "fp8_scale_shape": corrupt(
        quantized(fp8(weight_scale_inv=np.ones((3, 3), np.float32)), FP8), "scale_inv", "shape"
    ),
    "fp8_of_another_dtype": corrupt(
        quantized(fp8(weight=np.ones((OUT_SIZE, IN_SIZE), np.float32)), FP8), UP, "dtype F32"
    ),
    "fp8_unannounced": unsupported(
        weights_with({f"{UP}.weight": fp8()[f"{UP}.weight"]}), UP, "F8_E4M3"
    ),
    **{
        f"{name}_{problem}_{dtype}": corrupt(
            quantized(make(scales=scales(value)), table), UP, "infinities or NaN", dtype=dtype
        )
        for name, make, table in [("awq", awq, AWQ), ("gptq", gptq, GPTQ)]
        for problem, value in [("scale_nan", np.nan), ("scale_infinite", np.inf)]
        for dtype in ("f32", "int8", "int4")
    },
    "awq_scale_overflows": corrupt(
        quantized(awq(scales=scales(3.4e38, np.float32), qweight=np.full((64, 12), -1, np.int32)),
                  AWQ),
        UP,
        "infinities or NaN",
    ),
    "awq_scale_overflows_int4": corrupt(
        quantized(awq(scales=scales(3.4e38, np.float32), qweight=np.full((64, 12), -1, np.int32)),
                  AWQ),
        UP,
        "infinities or NaN",
        dtype="int4",
    ),
    "awq_zeros_missing": corrupt(quantized(awq(), AWQ, without="qzeros"), "qzeros", "missing"),
    "awq_zeros_shape": corrupt(
        quantized(awq(qzeros=np.zeros((1, 12), np.int32)), AWQ), "qzeros", "shape"
    ),
    "awq_packed_shape": corrupt(
        quantized(awq(qweight=np.ones((IN_SIZE, 13), np.int32)), AWQ), "shape"
    ),
    "awq_packed_axes": corrupt(
        quantized(awq(qweight=np.ones((IN_SIZE, 3, 4), np.int32)), AWQ), "qweight", "axes"
    ),
    "awq_packed_dtype": corrupt(
        quantized(awq(qweight=np.ones((IN_SIZE, 12), np.float32)), AWQ), "qweight", "F32"
    ),
    "awq_group_of_another_size": corrupt(
        quantized(awq(), AWQ | {"group_size": 16}), "shape"
    ),
    "awq_beside_plain": corrupt(
        weights_with(awq(), quantization=AWQ), UP, "beside its quantised form"
    ),
    "awq_unannounced": corrupt(quantized(awq(), None), UP, "missing"),  # type: ignore[arg-type]
    "gptq_group_index_outside": corrupt(
        quantized(gptq(g_idx=np.full(IN_SIZE, 2, np.int32)), GPTQ), "g_idx", "not there"
    ),
    "gptq_group_index_negative": corrupt(
        quantized(gptq(g_idx=np.full(IN_SIZE, -1, np.int32)), GPTQ), "g_idx", "not there",
        dtype="int4",
    ),
    "gptq_group_index_shape": corrupt(
        quantized(gptq(g_idx=np.zeros(3, np.int32)), GPTQ), "g_idx", "shape"
    ),
    "gptq_bits_of_another_size": corrupt(quantized(gptq(), GPTQ | {"bits": 8}), UP),
    "mxfp4_of_a_dense_family": corrupt(
        quantized(
            {
                f"{UP}.weight_blocks": np.zeros((1, OUT_SIZE, 2, 16), np.uint8),
                f"{UP}.weight_scales": np.zeros((1, OUT_SIZE, 2), np.uint8),
            },
            {"quant_method": "mxfp4"},
        ),
        UP,
    ),
    "shape_transposed": corrupt(
        weights_with({f"{UP}.weight": np.ones((IN_SIZE, OUT_SIZE), np.float32)}), UP, "has shape"
    ),
    "dtype_integer": unsupported(
        weights_with({f"{UP}.weight": np.ones((OUT_SIZE, IN_SIZE), np.int32)}), UP, "I32"
    ),
}  # fmt: skip

CASES = NUMBER_CASES | FORMAT_CASES
