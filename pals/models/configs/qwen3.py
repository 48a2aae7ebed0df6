"""Qwen3 (https://arxiv.org/abs/2505.09388; transformers: configuration_qwen3.py)."""

from __future__ import annotations

from pals.models.configs.dense import (
    AttentionSwitches,
    DenseConfig,
    build_dense,
    read_qwen_windows,
)
from pals.models.configs.reader import ConfigReader
from pals.models.configs.shared import read_common, read_heads

DEFAULT_HEAD_DIM = 128


def read(reader: ConfigReader) -> DenseConfig:
    """Read a config of model_type ``qwen3``."""
    reader.expect("hidden_act", "silu")
    common = read_common(reader, positions=32768)
    bias = reader.boolean("attention_bias")
    switches = AttentionSwitches(
        windows=read_qwen_windows(reader, common["num_layers"]),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )
    heads = read_heads(reader, common["hidden_size"], head_dim=DEFAULT_HEAD_DIM)
    config = build_dense(reader, common, heads, switches, family="qwen3")
    reader.refuse_unknown()
    return config
