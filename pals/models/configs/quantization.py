"""What config.json's ``quantization_config`` says about how the weights are stored.

Sources: transformers' utils/quantization_config.py, and the published configs of
DeepSeek-V3, Qwen3-FP8, gpt-oss, AutoAWQ and GPTQModel. Which modules are stored plainly
is seen in the names of the tensors, so lists of them are read and not needed.
"""

from __future__ import annotations

from types import MappingProxyType

from pals.models.config import QuantizationConfig, StorageMethod
from pals.models.configs.reader import ConfigReader, shown

METHODS: dict[str, StorageMethod] = {"fp8": "fp8", "awq": "awq", "gptq": "gptq", "mxfp4": "mxfp4"}

MAX_GROUP_SIZE = 1 << 17
MAX_BLOCK_SIZE = 1 << 12

_EXCEPTIONS = ("modules_to_not_convert", "ignored_layers")

_INERT = MappingProxyType(
    {
        "fp8": (),
        "mxfp4": (),
        "awq": (
            "backend", "do_fuse", "exllama_config", "fuse_max_seq_len", "modules_to_fuse",
        ),
        "gptq": (
            "act_group_aware", "backend", "batch_size", "block_name_to_quantize",
            "cache_block_outputs", "damp_auto_increment", "damp_percent", "dataset", "desc_act",
            "disable_exllama", "exllama_config", "lm_head", "max_input_length", "meta",
            "model_file_base_name", "model_name_or_path", "model_seqlen",
            "module_name_preceding_first_block", "modules_in_block_to_quantize", "mse",
            "pad_token_id", "quantizer", "static_groups", "sym", "tokenizer", "true_sequential",
            "use_cuda_fp16", "use_exllama",
        ),
    }
)  # fmt: skip
"""Keys on how the weights were made or which kernels use them, not on what they are."""


def read_quantization(reader: ConfigReader) -> QuantizationConfig:
    """Read the table ``quantization_config`` of config.json.

    Raises:
        UnsupportedModel: A method, key or value that is not implemented.
        CorruptModel: A value of the wrong type.
    """
    method = reader.take("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        known = ", ".join(f"`{name}`" for name in METHODS)
        raise reader.unsupported(f"quant_method {shown(method)} is not one of {known}")
    for key in _EXCEPTIONS:
        reader.strings(key)
    config = _READERS[METHODS[method]](reader)
    reader.refuse_unknown(*_INERT[method])
    return config


def _read_fp8(reader: ConfigReader) -> QuantizationConfig:
    reader.expect("activation_scheme", "dynamic", "static")
    reader.expect("fmt", "e4m3")
    reader.expect("scale_fmt", "float", "ue8m0")
    reader.expect("expert_dtype", "fp8")
    reader.expect("modules_to_convert", [])
    reader.expect("dequantize", True, False)  # it is done here anyway
    blocks: tuple[int, int] | None = None
    if reader.take("weight_block_size") is not None:
        sizes = reader.integers("weight_block_size", MAX_BLOCK_SIZE)
        if len(sizes) != 2 or 0 in sizes:
            raise reader.corrupt(f"`weight_block_size` is {shown(list(sizes))}, not two sizes")
        blocks = sizes[0], sizes[1]
    return QuantizationConfig(method="fp8", bits=8, block_size=blocks)


def _read_awq(reader: ConfigReader) -> QuantizationConfig:
    reader.expect("bits", 4)
    reader.expect("version", "gemm", "GEMM")
    reader.expect("format", "gemm", "GEMM")
    if not reader.boolean("zero_point", default=True):
        raise reader.unsupported("`zero_point` is false")
    return QuantizationConfig(method="awq", group_size=_read_group_size(reader))


def _read_gptq(reader: ConfigReader) -> QuantizationConfig:
    bits = reader.integer("bits", 8)
    if bits not in (4, 8):
        raise reader.unsupported(f"`bits` is {bits}; implemented is 4, 8")
    reader.expect("pack_dtype", "int32")
    reader.expect("dynamic", {})  # sizes of its own for each module
    formats = {"gptq": "gptq", "gptq_v2": "gptq_v2"}
    names = [
        reader.choice(key, formats, default="gptq")
        for key in ("checkpoint_format", "format")
        if reader.take(key) is not None
    ]
    return QuantizationConfig(
        method="gptq",
        bits=bits,
        group_size=_read_group_size(reader),
        zero_offset=0 if "gptq_v2" in names else 1,
    )


def _read_mxfp4(reader: ConfigReader) -> QuantizationConfig:
    reader.expect("dequantize", True, False)  # it is done here anyway
    return QuantizationConfig(method="mxfp4")


def _read_group_size(reader: ConfigReader) -> int | None:
    if reader.take("group_size") == -1:
        return None
    return reader.integer("group_size", MAX_GROUP_SIZE, default=128)


_READERS = {"fp8": _read_fp8, "awq": _read_awq, "gptq": _read_gptq, "mxfp4": _read_mxfp4}
