"""Llama 2 to 3.3 (https://arxiv.org/abs/2302.13971; transformers: configuration_llama.py)."""

from __future__ import annotations

from pals.models.configs.dense import AttentionSwitches, DenseConfig, build_dense
from pals.models.configs.reader import ConfigReader
from pals.models.configs.shared import read_common, read_heads


def read(reader: ConfigReader) -> DenseConfig:
    """Read a config of model_type ``llama``."""
    reader.expect("hidden_act", "silu")
    common = read_common(reader, positions=2048)
    bias = reader.boolean("attention_bias")
    switches = AttentionSwitches(
        windows=[None] * common["num_layers"], qkv_bias=bias, output_bias=bias
    )
    config = build_dense(
        reader,
        common,
        read_heads(reader, common["hidden_size"]),
        switches,
        family="llama",
        mlp_bias=reader.boolean("mlp_bias"),
    )
    reader.refuse_unknown("is_llama_config", "pretraining_tp")
    return config
