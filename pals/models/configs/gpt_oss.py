"""gpt-oss (https://arxiv.org/abs/2508.10925; transformers: configuration_gpt_oss.py)."""

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
from pals.models.configs.shared import read_common, read_heads, read_layer_types

DEFAULT_ROPE: dict[str, object] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
DEFAULT_THETA = 150_000.0
DEFAULT_HEAD_DIM = 64
DEFAULT_WINDOW = 128

INERT_KEYS = ("initial_context_length", "output_router_logits", "router_aux_loss_coef")
"""The first is what the model's authors call the rope's original length."""


def read(reader: ConfigReader) -> SparseConfig:
    """Read a config of model_type ``gpt_oss``."""
    reader = with_default_rope(reader)
    reader.expect("hidden_act", "silu")
    common = read_common(reader, positions=131_072, eps=1e-5)
    bias = reader.boolean("attention_bias", default=True)
    switches = AttentionSwitches(
        windows=read_windows(reader, common["num_layers"]),
        qkv_bias=bias,
        output_bias=bias,
        sinks=True,
    )
    moe = read_moe(reader, common["num_layers"])
    config = build_sparse(
        reader,
        common,
        read_heads(reader, common["hidden_size"], head_dim=DEFAULT_HEAD_DIM),
        switches,
        [moe] * common["num_layers"],
        family="gpt_oss",
        intermediate_size=moe.intermediate_size,
        theta=DEFAULT_THETA,
    )
    reader.refuse_unknown(*INERT_KEYS)
    return config


def with_default_rope(reader: ConfigReader) -> ConfigReader:
    """Return the reader of a config that says how its rope is scaled."""
    if any(reader.values.get(key) is not None for key in ("rope_parameters", "rope_scaling")):
        return reader
    return ConfigReader(
        {**reader.values, "rope_scaling": DEFAULT_ROPE}, reader.source, reader.taken
    )


def read_windows(reader: ConfigReader, num_layers: int) -> list[int | None]:
    """Return the windows of the layers, of which every other one sees all tokens."""
    slides = read_layer_types(reader, num_layers, [layer % 2 == 0 for layer in range(num_layers)])
    window = reader.optional_integer("sliding_window", MAX_POSITIONS)
    if "sliding_window" not in reader.values:
        window = DEFAULT_WINDOW
    if any(slides) and window is None:
        raise reader.corrupt("layers slide, but `sliding_window` is null")
    return [window if slide else None for slide in slides]


def read_moe(reader: ConfigReader, num_layers: int) -> MoEConfig:
    """Read the feed-forward part of the layers, which are all alike."""
    num_experts = read_num_experts(reader, default=128)
    per_token = reader.integer("num_experts_per_tok", MAX_EXPERTS, default=4)
    reader.expect("experts_per_token", per_token)
    router = checked_router(
        reader,
        num_layers,
        lambda: RouterConfig(
            kind="topk_softmax",
            num_experts=num_experts,
            num_experts_per_tok=per_token,
            bias=True,
        ),
    )
    return MoEConfig(
        router=router,
        intermediate_size=reader.integer("intermediate_size", MAX_INTERMEDIATE_SIZE),
        bias=True,
        swiglu_limit=reader.number("swiglu_limit", default=7.0),
        swiglu_alpha=reader.number("swiglu_alpha", default=1.702),
    )
