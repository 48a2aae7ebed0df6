"""Mixtral (https://arxiv.org/abs/2401.04088; transformers: configuration_mixtral.py)."""

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
    MAX_POSITIONS,
    ConfigReader,
)
from pals.models.configs.shared import read_common, read_heads

DEFAULT_THETA = 1000000.0

INERT_KEYS = ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
"""Of training only."""


def read(reader: ConfigReader) -> SparseConfig:
    """Read a config of model_type ``mixtral``."""
    reader.expect("hidden_act", "silu")
    common = read_common(reader, positions=4096 * 32, eps=1e-5)
    num_layers = common["num_layers"]
    window = reader.optional_integer("sliding_window", MAX_POSITIONS)
    num_experts = read_num_experts(reader, default=8)
    per_token = reader.integer("num_experts_per_tok", MAX_EXPERTS, default=2)
    router = checked_router(
        reader,
        num_layers,
        lambda: RouterConfig(
            kind="softmax_topk", num_experts=num_experts, num_experts_per_tok=per_token
        ),
    )
    size = reader.integer("intermediate_size", MAX_INTERMEDIATE_SIZE, default=14336)
    config = build_sparse(
        reader,
        common,
        read_heads(reader, common["hidden_size"]),
        AttentionSwitches(windows=[window] * num_layers),
        [MoEConfig(router=router, intermediate_size=size)] * num_layers,
        family="mixtral",
        intermediate_size=size,
        theta=DEFAULT_THETA,
    )
    reader.refuse_unknown(*INERT_KEYS)
    return config
