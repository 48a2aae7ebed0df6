"""Mistral (https://arxiv.org/abs/2310.06825; transformers: configuration_mistral.py)."""

from __future__ import annotations

from pals.models.configs.dense import AttentionSwitches, DenseConfig, build_dense
from pals.models.configs.reader import MAX_POSITIONS, ConfigReader
from pals.models.configs.shared import read_common, read_heads


def read(reader: ConfigReader) -> DenseConfig:
    """Read a config of model_type ``mistral``."""
    reader.expect("hidden_act", "silu")
    common = read_common(reader, positions=4096 * 32)
    window = reader.optional_integer("sliding_window", MAX_POSITIONS)
    if "sliding_window" not in reader.values:
        window = 4096
    config = build_dense(
        reader,
        common,
        read_heads(reader, common["hidden_size"]),
        AttentionSwitches(windows=[window] * common["num_layers"]),
        family="mistral",
    )
    reader.refuse_unknown()
    return config
