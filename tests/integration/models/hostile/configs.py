"""config.json files that lie, or that are no JSON."""

from __future__ import annotations

import json
from pathlib import Path

from tests.integration.models.hostile.cases import (
    Case,
    Spoil,
    config_of,
    config_with,
    corrupt,
    file_with,
    link_to,
    not_found,
    unsupported,
)
from tests.published_configs import PUBLISHED

CONFIG = "config.json"

SIZES = (
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)
NO_SIZES: dict[str, object] = {
    "zero": 0, "negative": -1, "true": True, "float": 64.0, "text": "64", "list": [64],
}  # fmt: skip
HUGE = {"billion": 10**9, "exabytes": 1 << 62, "googol": 10**100}


def config_text(text: str) -> Spoil:
    return file_with(CONFIG, text.encode())


def raw_entry(key: str, literal: str) -> Spoil:
    """Give a key a value that `json.dumps` would not write."""

    def spoil(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text()) | {key: "@"}
        (folder / CONFIG).write_text(json.dumps(values).replace('"@"', literal))

    return spoil


def family(model_type: str, **changes: object) -> Spoil:
    return config_of(PUBLISHED[model_type] | changes)


def rope(**table: object) -> Spoil:
    return config_with(rope_scaling=table)


def nested(depth: int) -> str:
    """Return a value whose depth is near what Python's parser or printer takes."""
    return "[" * depth + "]" * depth


SIZE_CASES: dict[str, Case] = {
    **{
        f"{key}_{name}": corrupt(config_with(**{key: value}), CONFIG, key)
        for key in SIZES
        for name, value in NO_SIZES.items()
    },
    **{
        f"{key}_{name}": unsupported(config_with(**{key: value}), CONFIG, key)
        for key in SIZES
        for name, value in HUGE.items()
    },
    "product": unsupported(
        config_with(hidden_size=1 << 17, intermediate_size=1 << 20, num_hidden_layers=1024),
        CONFIG,
        "parameters are too many",
    ),
    "more_layers_than_weights": corrupt(
        config_with(num_hidden_layers=1024), "no tensor of layer 2"
    ),
    "fewer_layers_than_weights": Case(
        spoil=config_with(num_hidden_layers=1), error="LayersOutsideModel", says=("0:2", "1")
    ),
    "heads_not_dividing": corrupt(config_with(num_key_value_heads=3), CONFIG, "do not divide"),
    "head_dim_odd": corrupt(config_with(head_dim=15), CONFIG, "must be even"),
    "head_dim_not_of_weights": corrupt(config_with(head_dim=32), "has shape"),
}

VALUE_CASES: dict[str, Case] = {
    "eos_past_vocabulary": corrupt(config_with(eos_token_id=259), CONFIG, "eos_token_id"),
    "eos_negative": corrupt(config_with(eos_token_id=[-1]), CONFIG, "eos_token_id"),
    "eos_many": corrupt(config_with(eos_token_id=[1] * 65), CONFIG, "eos_token_id"),
    "rope_zero": corrupt(rope(rope_type="linear", factor=0), CONFIG, "factor"),
    "rope_negative": corrupt(rope(rope_type="linear", factor=-2.0), CONFIG, "factor"),
    "rope_tiny": corrupt(rope(rope_type="linear", factor=1e-300), CONFIG, "factor"),
    "rope_text": corrupt(rope(rope_type="linear", factor="8"), CONFIG, "factor"),
    "rope_unknown": unsupported(rope(rope_type="su", factor=2.0), CONFIG, "rope type 'su'"),
    "rope_type_nested": unsupported(rope(rope_type=[[["x"]]], factor=2.0), CONFIG, "rope type"),
    "rope_key_unknown": unsupported(
        rope(rope_type="linear", factor=2.0, short_factor=[1]), "short_factor"
    ),
    "rope_base_one": corrupt(
        config_with(rope_theta=1.0, rope_scaling={"rope_type": "yarn", "factor": 2.0}), "above 1"
    ),
    "rope_bands_reversed": corrupt(
        rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=4.0,
            high_freq_factor=1.0,
            original_max_position_embeddings=64,
        ),
        "low_freq_factor",
    ),
    "rope_nan": corrupt(raw_entry("rope_theta", "NaN"), CONFIG, "rope_theta"),
    "rope_infinite": corrupt(raw_entry("rope_theta", "Infinity"), CONFIG, "rope_theta"),
    "rope_overflows": corrupt(raw_entry("rope_theta", "1e999"), CONFIG, "rope_theta"),
    "eps_nan": corrupt(raw_entry("rms_norm_eps", "NaN"), CONFIG, "rms_norm_eps"),
    "unknown_key": unsupported(config_with(attn_window=7), CONFIG, "attn_window"),
    "unknown_family": unsupported(config_with(model_type="mamba"), CONFIG, "mamba"),
    "family_no_text": unsupported(config_with(model_type=["llama"]), CONFIG, "model_type"),
    "architecture_of_another": unsupported(
        config_with(architectures=["LlamaForSequenceClassification"]), CONFIG, "architectures"
    ),
    "layer_types_short": corrupt(
        family("qwen3", layer_types=["full_attention"]), CONFIG, "layer_types"
    ),
    "layer_types_unknown": unsupported(
        family("qwen3", layer_types=["linear_attention"] * 36), CONFIG, "linear_attention"
    ),
    "window_zero": corrupt(family("mistral", sliding_window=0), CONFIG, "sliding_window"),
    "window_negative": corrupt(family("mistral", sliding_window=-5), CONFIG, "sliding_window"),
    "experts_per_token": corrupt(family("mixtral", num_experts_per_tok=9), CONFIG, "9 of 8"),
    "experts_none": corrupt(family("qwen3_moe", num_experts=0), CONFIG, "num_experts"),
    "experts_huge": unsupported(family("qwen3_moe", num_experts=1 << 40), CONFIG, "num_experts"),
    "experts_in_all": unsupported(family("qwen3_moe", num_experts=4096), CONFIG, "experts"),
    "experts_of_two_names": corrupt(family("mixtral", num_experts=4), CONFIG, "experts"),
    "mlp_only_layers_outside": corrupt(
        family("qwen3_moe", num_hidden_layers=48, mlp_only_layers=[48]), CONFIG, "mlp_only_layers"
    ),
    "groups_not_dividing": corrupt(family("deepseek_v3", n_group=7), CONFIG, "7 groups"),
    "groups_chosen": corrupt(family("deepseek_v3", topk_group=9), CONFIG, "9 of 8 groups"),
    "groups_of_one": corrupt(family("deepseek_v3", n_group=256, topk_group=9), CONFIG, "groups"),
    "rank_zero": corrupt(family("deepseek_v3", kv_lora_rank=0), CONFIG, "kv_lora_rank"),
    "rotary_share": corrupt(family("glm4_moe", partial_rotary_factor=1.5), CONFIG, "rotary"),
}

QUANTIZATION_CASES: dict[str, Case] = {
    f"quantization_{name}": Case(
        spoil=config_with(quantization_config=table), error=error, says=(CONFIG, says)
    )
    for name, table, error, says in [
        ("unknown", {"quant_method": "aqlm"}, "UnsupportedModel", "aqlm"),
        ("of_no_name", {"bits": 4}, "UnsupportedModel", "quant_method"),
        ("no_table", "awq", "CorruptModel", "quantization_config"),
        ("bits", {"quant_method": "gptq", "bits": 3}, "UnsupportedModel", "bits"),
        ("bits_no_size", {"quant_method": "gptq", "bits": True}, "CorruptModel", "bits"),
        ("group_zero", {"quant_method": "awq", "group_size": 0}, "CorruptModel", "group_size"),
        ("group", {"quant_method": "awq", "group_size": 1 << 40}, "UnsupportedModel", "group_size"),
        (
            "blocks",
            {"quant_method": "fp8", "weight_block_size": [1 << 40, 1]},
            "CorruptModel",
            "weight_block_size",
        ),
        (
            "one_block",
            {"quant_method": "fp8", "weight_block_size": [128]},
            "CorruptModel",
            "weight_block_size",
        ),
        (
            "key_unknown",
            {"quant_method": "mxfp4", "block_size": 64},
            "UnsupportedModel",
            "block_size",
        ),
        (
            "code",
            {"quant_method": "awq", "version": "exllama"},
            "UnsupportedModel",
            "version",
        ),
    ]
}

TEXT_CASES: dict[str, Case] = {
    "empty": corrupt(config_text(""), CONFIG, "not valid JSON"),
    "list": corrupt(config_text("[]"), CONFIG, "JSON object"),
    "binary": corrupt(file_with(CONFIG, b"\x80\x04\x95"), CONFIG, "not valid JSON"),
    "no_utf_8": corrupt(file_with(CONFIG, b'{"a": "\xff\xfe"}'), CONFIG, "not valid JSON"),
    "key_twice": corrupt(config_text('{"model_type": "llama", "model_type": "x"}'), "twice"),
    "digits": corrupt(raw_entry("vocab_size", "9" * 10**5), CONFIG, "not valid JSON"),
    "many_digits": corrupt(raw_entry("vocab_size", "9" * 10**7), CONFIG, "larger than"),
    "deep": corrupt(config_text(nested(10**5)), CONFIG, "not valid JSON"),
    **{
        f"deep_{depth}": Case(spoil=raw_entry("unread", nested(depth)), error="*", says=(CONFIG,))
        for depth in range(880, 1000, 6)
    },
    "large": corrupt(config_text(" " * (100 << 20)), CONFIG, "larger than"),
    "endless": corrupt(link_to(CONFIG, "/dev/zero"), CONFIG, "link out of"),
    "absent": not_found(lambda folder: (folder / CONFIG).unlink(), CONFIG),
}

CASES = {
    f"config_{name}": case
    for name, case in (SIZE_CASES | VALUE_CASES | QUANTIZATION_CASES | TEXT_CASES).items()
}
