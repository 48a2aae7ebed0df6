"""Qwen3 MoE (https://arxiv.org/abs/2505.09388; transformers: configuration_qwen3_moe.py)."""

from __future__ import annotations

from pals.models.configs.dense import AttentionSwitches
from pals.models.configs.moe import (
    MoEConfig,
    RouterConfig,
    SparseConfig,
    build_sparse,
    checked_router,
    read_num_experts,
)
from pals.models.configs.reader import (
    MAX_EXPERTS,
    MAX_INTERMEDIATE_SIZE,
    MAX_LAYERS,
    MAX_POSITIONS,
    ConfigReader,
)
from pals.models.configs.shared import read_common, read_heads

INERT_KEYS = ("max_window_layers", "output_router_logits", "router_aux_loss_coef")
"""The first is inert for this family alone: with it, all layers slide or none."""


def read(reader: ConfigReader) -> SparseConfig:
    """Read a config of model_type ``qwen3_moe``."""
    reader.expect("hidden_act", "silu")
    common = read_common(reader, positions=32768)
    num_layers = common["num_layers"]
    bias = reader.boolean("attention_bias")
    switches = AttentionSwitches(
        windows=[read_window(reader)] * num_layers, qkv_bias=bias, output_bias=bias, qk_norm=True
    )
    moe = read_moe(reader, num_layers)
    config = build_sparse(
        reader,
        common,
        read_heads(reader, common["hidden_size"]),
        switches,
        [moe if is_sparse else None for is_sparse in read_sparse_layers(reader, num_layers)],
        family="qwen3_moe",
        intermediate_size=reader.integer("intermediate_size", MAX_INTERMEDIATE_SIZE, default=6144),
    )
    reader.refuse_unknown(*INERT_KEYS)
    return config


def read_window(reader: ConfigReader) -> int | None:
    """Return the attention window, which ``use_sliding_window`` has to turn on."""
    window = reader.optional_integer("sliding_window", MAX_POSITIONS)
    return window if reader.boolean("use_sliding_window") else None


def read_moe(reader: ConfigReader, num_layers: int) -> MoEConfig:
    """Read the feed-forward part of the sparse layers, which are all alike."""
    num_experts = read_num_experts(reader, default=128)
    per_token = reader.integer("num_experts_per_tok", MAX_EXPERTS, default=8)
    norm = reader.boolean("norm_topk_prob")
    router = checked_router(
        reader,
        num_layers,
        lambda: RouterConfig(
            kind="softmax_topk",
            num_experts=num_experts,
            num_experts_per_tok=per_token,
            norm_topk_prob=norm,
        ),
    )
    size = reader.integer("moe_intermediate_size", MAX_INTERMEDIATE_SIZE, default=768)
    return MoEConfig(router=router, intermediate_size=size)


def read_sparse_layers(reader: ConfigReader, num_layers: int) -> list[bool]:
    """Return for each layer whether it has experts (transformers: Qwen3MoeDecoderLayer)."""
    step = reader.integer("decoder_sparse_step", MAX_LAYERS, default=1)
    dense = reader.integers("mlp_only_layers", num_layers)
    return [layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)]
