"""Qwen2 and Qwen2.5 (https://arxiv.org/abs/2407.10671; configuration_qwen2.py)."""

from __future__ import annotations

from pals.models.configs.dense import (
    AttentionSwitches,
    DenseConfig,
    build_dense,
    read_qwen_windows,
)
from pals.models.configs.reader import ConfigReader
from pals.models.configs.shared import read_common, read_heads


def read(reader: ConfigReader) -> DenseConfig:
    """Read a config of model_type ``qwen2``."""
    reader.expect("hidden_act", "silu")
    common = read_common(reader, positions=32768)
    switches = AttentionSwitches(
        windows=read_qwen_windows(reader, common["num_layers"]), qkv_bias=True
    )
    heads = read_heads(reader, common["hidden_size"])
    config = build_dense(reader, common, heads, switches, family="qwen2")
    reader.refuse_unknown("use_mrope")
    return config
