"""Storage formats of checkpoints against references written from their definitions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.errors import CorruptModel, UnsupportedModel
from pals.models.config import QuantizationConfig
from pals.models.configs.quantization import read_quantization
from pals.models.configs.reader import ConfigReader
from pals.models.quantize import dequantize_int4, pack_int4
from pals.models.storage import Storage
from pals.models.stored import StoredWeight

SOURCE = Path("model")
MATRIX = "model.layers.0.self_attn.q_proj"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"

DTYPES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(np.int32): "I32",
    np.dtype(np.uint8): "U8",
}


@dataclass(frozen=True)
class FakeTensor:
    name: str
    array: np.ndarray
    path: Path = SOURCE

    @property
    def dtype(self) -> str:
        return DTYPES[self.array.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def part(self, index: int) -> FakeTensor:
        return replace(self, array=self.array[index])

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        return self.array[start:stop].copy()

    def read(self) -> np.ndarray:
        return self.array.copy()


Arrays = dict[str, np.ndarray]


def open_weight(config: QuantizationConfig | None, arrays: Arrays, name: str) -> StoredWeight:
    tensors = {tensor: FakeTensor(tensor, array) for tensor, array in arrays.items()}
    return Storage.of(config, set(tensors), SOURCE).weight(name, tensors)


def decode(weight: StoredWeight, most_bytes: int = 1 << 20) -> np.ndarray:
    blocks = list(weight.blocks(most_bytes))
    assert [rows.start for rows, _ in blocks] == [0, *(rows.stop for rows, _ in blocks[:-1])]
    assert blocks[-1][0].stop == weight.shape[0]
    return np.concatenate([np.asarray(block, np.float32) for _, block in blocks])


def read(values: dict[str, object]) -> QuantizationConfig:
    return read_quantization(ConfigReader(values, "config.json"))


# --- config.json -----------------------------------------------------------------------

PUBLISHED: dict[str, tuple[dict[str, object], QuantizationConfig]] = {
    "DeepSeek-V3": (
        {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
        QuantizationConfig(method="fp8", bits=8, block_size=(128, 128)),
    ),
    "Qwen3-FP8": (
        {
            "activation_scheme": "dynamic",
            "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm"],
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
        QuantizationConfig(method="fp8", bits=8, block_size=(128, 128)),
    ),
    "Qwen2.5-AWQ": (
        {
            "bits": 4,
            "group_size": 128,
            "modules_to_not_convert": None,
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
        },
        QuantizationConfig(method="awq", group_size=128),
    ),
    "Qwen2.5-GPTQ": (
        {
            "batch_size": 1,
            "bits": 4,
            "block_name_to_quantize": None,
            "cache_block_outputs": True,
            "damp_percent": 0.01,
            "dataset": None,
            "desc_act": False,
            "exllama_config": {"version": 1},
            "group_size": 128,
            "max_input_length": None,
            "model_seqlen": None,
            "module_name_preceding_first_block": None,
            "modules_in_block_to_quantize": None,
            "pad_token_id": None,
            "quant_method": "gptq",
            "sym": True,
            "tokenizer": None,
            "true_sequential": True,
            "use_cuda_fp16": False,
            "use_exllama": True,
        },
        QuantizationConfig(method="gptq", group_size=128, zero_offset=1),
    ),
    "GPTQModel": (
        {
            "bits": 8,
            "checkpoint_format": "gptq_v2",
            "group_size": -1,
            "meta": {"quantizer": ["gptqmodel:2.0.0"]},
            "pack_dtype": "int32",
            "quant_method": "gptq",
        },
        QuantizationConfig(method="gptq", bits=8),
    ),
    "gpt-oss": (
        {
            "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
            "quant_method": "mxfp4",
        },
        QuantizationConfig(method="mxfp4"),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name: str):
    values, wanted = PUBLISHED[name]
    assert read(values) == wanted


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": ["fp8"]}, "fp8"),
        ({}, "quant_method None"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "e5m2"),
        ({"quant_method": "fp8", "rotation": "hadamard"}, "rotation"),
        ({"quant_method": "awq", "version": "gemv"}, "gemv"),
        ({"quant_method": "awq", "bits": 3}, "`bits` is 3"),
        ({"quant_method": "awq", "zero_point": False}, "zero_point"),
        ({"quant_method": "gptq", "bits": 3}, "`bits` is 3"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"lm_head": {"bits": 8}}}, "dynamic"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "is_marlin_format"),
        ({"quant_method": "mxfp4", "group_size": 16}, "group_size"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(values: dict[str, object], named: str):
    with pytest.raises(UnsupportedModel, match=r"config\.json") as refusal:
        read(values)
    assert named in str(refusal.value)


@pytest.mark.parametrize(
    "values",
    [
        {"quant_method": "fp8", "weight_block_size": [128]},
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
        {"quant_method": "fp8", "modules_to_not_convert": "lm_head"},
        {"quant_method": "gptq"},
        {"quant_method": "gptq", "bits": "4"},
        {"quant_method": "awq", "group_size": 0},
        {"quant_method": "awq", "group_size": True},
    ],
)
def test_values_that_cannot_be_are_corrupt(values: dict[str, object]):
    with pytest.raises(CorruptModel):
        read(values)


# --- fp8 -------------------------------------------------------------------------------

FP8 = QuantizationConfig(method="fp8", bits=8, block_size=(128, 128))


def fp8_arrays(rows: int, columns: int, *, dtype: type = np.float32) -> Arrays:
    random = np.random.default_rng(0)
    weight = random.standard_normal((rows, columns), np.float32).astype(ml_dtypes.float8_e4m3fn)
    scales = random.random((-(-rows // 128), -(-columns // 128)), np.float32).astype(dtype)
    return {f"{MATRIX}.weight": weight, f"{MATRIX}.weight_scale_inv": scales}


def reference_fp8(arrays: Arrays) -> np.ndarray:
    """DeepSeek-V3, inference/kernel.py: each element times the scale of its block."""
    weight = arrays[f"{MATRIX}.weight"].astype(np.float32)
    scales = arrays[f"{MATRIX}.weight_scale_inv"].astype(np.float32)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            weight[row, column] *= scales[row // 128, column // 128]
    return weight


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(128, 128), (150, 200), (3, 5), (260, 128)])
def test_fp8_blocks_are_scaled(shape: tuple[int, int], dtype: type):
    arrays = fp8_arrays(*shape, dtype=dtype)
    weight = open_weight(FP8, arrays, f"{MATRIX}.weight")
    assert weight.shape == shape
    for most_bytes in (1, 4 * shape[1] * 7, 1 << 20):
        np.testing.assert_array_equal(decode(weight, most_bytes), reference_fp8(arrays))


def test_fp8_exponents_are_powers_of_two():
    arrays = fp8_arrays(130, 128)
    arrays[f"{MATRIX}.weight_scale_inv"] = np.array([[120], [129]], np.uint8)
    got = decode(open_weight(FP8, arrays, f"{MATRIX}.weight"))
    stored = arrays[f"{MATRIX}.weight"].astype(np.float32)
    np.testing.assert_array_equal(got[:128], stored[:128] * 2.0**-7)
    np.testing.assert_array_equal(got[128:], stored[128:] * 4)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("part", ["weight_scale", "weight_scale_inv"])
def test_fp8_may_have_one_scale_for_the_matrix(part: str, shape: tuple[int, ...]):
    config = QuantizationConfig(method="fp8", bits=8)
    weight = fp8_arrays(6, 9)[f"{MATRIX}.weight"]
    arrays = {f"{MATRIX}.weight": weight, f"{MATRIX}.{part}": np.full(shape, 0.5, np.float32)}
    arrays[f"{MATRIX}.input_scale"] = np.ones((), np.float32)
    got = decode(open_weight(config, arrays, f"{MATRIX}.weight"))
    np.testing.assert_array_equal(got, weight.astype(np.float32) * 0.5)


# --- AWQ and GPTQ ----------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """A quantised matrix before it is packed: codes [in, out], zeros and scales [G, out]."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    group_of: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """[out, in]."""
        steps = self.codes.astype(np.float32) - self.zeros[self.group_of]
        return (steps * self.scales.astype(np.float32)[self.group_of]).T


def draw_grid(
    columns: int, rows: int, group_size: int, *, bits: int = 4, first_zero: int = 0, seed: int = 0
) -> Grid:
    random = np.random.default_rng(seed)
    groups = -(-columns // group_size)
    top = 1 << bits
    return Grid(
        codes=random.integers(0, top, (columns, rows)),
        zeros=random.integers(first_zero, top + first_zero, (groups, rows)),
        scales=(random.random((groups, rows), np.float32) + 0.01).astype(np.float16),
        group_of=np.arange(columns) // group_size,
    )


def pack(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Pack the last axis into 32-bit words: code ``order[i]`` of each word at bit i * bits."""
    count = 32 // bits
    words = np.zeros((*codes.shape[:-1], codes.shape[-1] // count), np.uint32)
    for i in range(count):
        of_word = codes[..., (order[i] if order else i) :: count]
        words |= of_word.astype(np.uint32) << np.uint32(i * bits)
    return words.view(np.int32)


def awq_arrays(grid: Grid) -> Arrays:
    """AutoAWQ, awq/modules/linear/gemm.py: `WQLinear_GEMM.from_linear`."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        f"{MATRIX}.qweight": pack(grid.codes, 4, order),
        f"{MATRIX}.qzeros": pack(grid.zeros, 4, order),
        f"{MATRIX}.scales": grid.scales,
    }


def gptq_arrays(grid: Grid, bits: int, zero_offset: int) -> Arrays:
    """AutoGPTQ, nn_modules/qlinear/qlinear_cuda.py: `pack`."""
    return {
        f"{MATRIX}.qweight": np.ascontiguousarray(pack(grid.codes.T, bits).T),
        f"{MATRIX}.qzeros": pack(grid.zeros - zero_offset, bits),
        f"{MATRIX}.scales": grid.scales,
        f"{MATRIX}.g_idx": grid.group_of.astype(np.int32),
    }


@settings(max_examples=20, deadline=None)
@given(columns=st.integers(1, 70), words=st.integers(1, 5), most_bytes=st.integers(1, 9000))
def test_awq_is_unpacked_in_its_order(columns: int, words: int, most_bytes: int):
    grid = draw_grid(columns, 8 * words, 32)
    config = QuantizationConfig(method="awq", group_size=32)
    weight = open_weight(config, awq_arrays(grid), f"{MATRIX}.weight")
    assert weight.shape == (8 * words, columns)
    np.testing.assert_array_equal(decode(weight, most_bytes), grid.values)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_offset", [0, 1])
@pytest.mark.parametrize("act_order", [False, True])
@settings(max_examples=10, deadline=None)
@given(words=st.integers(1, 12), most_bytes=st.integers(1, 9000), seed=st.integers(0, 9))
def test_gptq_is_unpacked(
    bits: int, zero_offset: int, act_order: bool, words: int, most_bytes: int, seed: int
):
    columns = words * 32 // bits
    grid = draw_grid(columns, 16, 32, bits=bits, first_zero=zero_offset, seed=seed)
    if act_order:
        order = np.random.default_rng(seed).permutation(columns)
        grid = replace(grid, group_of=grid.group_of[order])
    config = QuantizationConfig(method="gptq", bits=bits, group_size=32, zero_offset=zero_offset)
    weight = open_weight(config, gptq_arrays(grid, bits, zero_offset), f"{MATRIX}.weight")
    assert weight.shape == (16, columns)
    np.testing.assert_array_equal(decode(weight, most_bytes), grid.values)


@pytest.mark.parametrize("columns", [128, 200])  # the last group whole and partial
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_four_bits_stay_the_same_four_bits(method: str, columns: int):
    if method == "awq":
        grid = draw_grid(columns, 16, 64)
        config, arrays = QuantizationConfig(method="awq", group_size=64), awq_arrays(grid)
    else:
        grid = draw_grid(columns, 16, 64, first_zero=1)
        config = QuantizationConfig(method="gptq", group_size=64, zero_offset=1)
        arrays = gptq_arrays(grid, 4, 1)
    weight = open_weight(config, arrays, f"{MATRIX}.weight")
    assert weight.is_int4(64)
    assert not weight.is_int4(32)
    groups = grid.scales.shape[0]
    for part, stored in weight.int4_blocks(8 * 4 * weight.shape[1], 64):
        got = pack_int4(*stored, 64)
        np.testing.assert_array_equal(got.scales[:groups], grid.scales[:, part])
        np.testing.assert_array_equal(got.zeros[:groups], grid.zeros[:, part])
        np.testing.assert_array_equal(dequantize_int4(got, columns), grid.values[part])


def test_act_order_and_eight_bits_are_not_kept_as_int4():
    grid = draw_grid(64, 16, 32, first_zero=1)
    grid = replace(grid, group_of=grid.group_of[::-1])
    config = QuantizationConfig(method="gptq", group_size=32, zero_offset=1)
    weight = open_weight(config, gptq_arrays(grid, 4, 1), f"{MATRIX}.weight")
    assert not weight.is_int4(32)
    with pytest.raises(ValueError, match="not kept in 4 bits"):
        next(weight.int4_blocks(1, 32))
    wide = draw_grid(64, 16, 32, bits=8, first_zero=1)
    config = replace(config, bits=8)
    assert not open_weight(config, gptq_arrays(wide, 8, 1), f"{MATRIX}.weight").is_int4(32)


def test_one_group_may_span_a_row():
    grid = draw_grid(48, 16, 48)
    config = QuantizationConfig(method="awq")
    weight = open_weight(config, awq_arrays(grid), f"{MATRIX}.weight")
    np.testing.assert_array_equal(decode(weight), grid.values)


def test_groups_that_are_not_there_are_corrupt():
    grid = draw_grid(64, 16, 32, first_zero=1)
    arrays = gptq_arrays(grid, 4, 1)
    arrays[f"{MATRIX}.g_idx"][5] = 2
    config = QuantizationConfig(method="gptq", group_size=32, zero_offset=1)
    with pytest.raises(CorruptModel, match="groups that are not there"):
        decode(open_weight(config, arrays, f"{MATRIX}.weight"))


# --- MXFP4 -----------------------------------------------------------------------------

MXFP4 = QuantizationConfig(method="mxfp4")


def element_value(code: int) -> float:
    """E2M1 of the OCP Microscaling Formats specification 1.0, section 5.3.3."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -size if sign else size


def mxfp4_arrays(experts: int, rows: int, blocks: int) -> Arrays:
    random = np.random.default_rng(0)
    return {
        f"{EXPERTS}_blocks": random.integers(0, 256, (experts, rows, blocks, 16), np.uint8),
        f"{EXPERTS}_scales": random.integers(100, 140, (experts, rows, blocks), np.uint8),
    }


def test_mxfp4_is_decoded_expert_by_expert():
    arrays = mxfp4_arrays(3, 4, 2)
    weight = open_weight(MXFP4, arrays, f"{EXPERTS}_blocks")
    assert weight.shape == (3, 4, 64)
    for expert in range(3):
        part = weight.part(expert)
        assert part.shape == (4, 64)
        got = decode(part, 4 * 64 * 3)
        for row, column in np.ndindex(4, 64):
            block, inside = divmod(column, 32)
            byte = int(arrays[f"{EXPERTS}_blocks"][expert, row, block, inside // 2])
            code = byte >> 4 if inside % 2 else byte & 15
            exponent = int(arrays[f"{EXPERTS}_scales"][expert, row, block]) - 127
            assert got[row, column] == element_value(code) * 2.0**exponent


def test_an_exponent_that_is_no_number_gives_none():
    arrays = mxfp4_arrays(1, 2, 1)
    arrays[f"{EXPERTS}_scales"][0, 1, 0] = 255
    got = decode(open_weight(MXFP4, arrays, f"{EXPERTS}_blocks").part(0))
    assert np.isfinite(got[0]).all()
    assert np.isnan(got[1]).all()


@pytest.mark.parametrize("scale", [np.inf, np.nan, 3e38])
def test_scales_that_overflow_are_passed_on_to_be_refused(scale: float):
    arrays = fp8_arrays(4, 4)
    arrays[f"{MATRIX}.weight"][:] = 448
    arrays[f"{MATRIX}.weight_scale_inv"][:] = scale
    assert not np.isfinite(decode(open_weight(FP8, arrays, f"{MATRIX}.weight"))).any()
    arrays = mxfp4_arrays(1, 1, 1)
    arrays[f"{EXPERTS}_blocks"][:] = 0x77
    arrays[f"{EXPERTS}_scales"][:] = 254
    assert not np.isfinite(decode(open_weight(MXFP4, arrays, f"{EXPERTS}_blocks"))).any()


# --- names, shapes and dtypes ----------------------------------------------------------


def test_plain_weights_pass_in_every_format():
    arrays = fp8_arrays(4, 4) | {"model.norm.weight": np.ones(4, np.float32)}
    tensors = {name: FakeTensor(name, array) for name, array in arrays.items()}
    storage = Storage.of(FP8, set(tensors), SOURCE)
    assert storage.names == {f"{MATRIX}.weight", "model.norm.weight"}
    assert storage.tensors(f"{MATRIX}.weight") == (
        f"{MATRIX}.weight_scale_inv",
        f"{MATRIX}.weight",
    )
    assert storage.weight("model.norm.weight", tensors).shape == (4,)
    assert Storage.of(None, set(tensors), SOURCE).names == set(tensors)


AWQ = QuantizationConfig(method="awq", group_size=32)
GPTQ = QuantizationConfig(method="gptq", group_size=32, zero_offset=1)
GOOD: dict[str, tuple[QuantizationConfig, Arrays, str]] = {
    "fp8": (FP8, fp8_arrays(8, 8), f"{MATRIX}.weight"),
    "awq": (AWQ, awq_arrays(draw_grid(64, 16, 32)), f"{MATRIX}.weight"),
    "gptq": (GPTQ, gptq_arrays(draw_grid(64, 16, 32, first_zero=1), 4, 1), f"{MATRIX}.weight"),
    "mxfp4": (MXFP4, mxfp4_arrays(2, 4, 1), f"{EXPERTS}_blocks"),
}


EVERY_TENSOR = [(method, tensor) for method, (_, arrays, _) in GOOD.items() for tensor in arrays]
NEEDED = [case for case in EVERY_TENSOR if not case[1].endswith(("g_idx", "weight_scale_inv"))]


@pytest.mark.parametrize(("method", "tensor"), NEEDED)
def test_half_of_a_matrix_is_refused(method: str, tensor: str):
    config, arrays, _ = GOOD[method]
    with pytest.raises(CorruptModel) as refusal:
        Storage.of(config, set(arrays) - {tensor}, SOURCE)
    assert f"`{tensor}` is missing" in str(refusal.value)


def test_fp8_without_its_scale_is_refused():
    config, arrays, name = GOOD["fp8"]
    with pytest.raises(UnsupportedModel, match="F8_E4M3"):
        open_weight(config, {name: arrays[name]}, name)


@pytest.mark.parametrize(("method", "tensor"), EVERY_TENSOR)
@pytest.mark.parametrize("axis", [0, -1])
def test_a_tensor_of_another_shape_is_refused(method: str, tensor: str, axis: int):
    config, arrays, name = GOOD[method]
    other = np.concatenate([arrays[tensor]] * 2, axis=axis)
    if tensor == f"{MATRIX}.weight":
        other = np.concatenate([arrays[tensor]] * 17, axis=axis)  # past one block
    with pytest.raises(CorruptModel, match="instead of"):
        open_weight(config, arrays | {tensor: other}, name)


@pytest.mark.parametrize(("method", "tensor"), EVERY_TENSOR)
def test_a_tensor_of_another_number_of_axes_is_refused(method: str, tensor: str):
    config, arrays, name = GOOD[method]
    with pytest.raises(CorruptModel, match="instead of"):
        open_weight(config, arrays | {tensor: arrays[tensor][None]}, name)


@pytest.mark.parametrize(("method", "tensor"), EVERY_TENSOR)
def test_a_tensor_of_another_dtype_is_refused(method: str, tensor: str):
    config, arrays, name = GOOD[method]
    other = np.int32 if arrays[tensor].dtype != np.int32 else np.float32
    with pytest.raises(CorruptModel, match="has dtype"):
        open_weight(config, arrays | {tensor: arrays[tensor].astype(other)}, name)


def test_a_matrix_that_stands_there_twice_is_refused():
    config, arrays, name = GOOD["awq"]
    with pytest.raises(CorruptModel, match="beside its quantised form"):
        Storage.of(config, {*arrays, name}, SOURCE)
    config, arrays, name = GOOD["fp8"]
    with pytest.raises(CorruptModel, match="exclude each other"):
        Storage.of(config, {*arrays, f"{MATRIX}.weight_scale"}, SOURCE)


def test_a_plain_weight_of_integers_is_refused():
    with pytest.raises(UnsupportedModel, match="I32"):
        open_weight(None, {"a": np.zeros(3, np.int32)}, "a")
