"""Gemma 3, text only (https://arxiv.org/abs/2503.19786; transformers: configuration_gemma3.py).

Small checkpoints are text models, ``gemma3_text``. Larger ones see images too, ``gemma3``:
their ``text_config`` is read, which leaves out whatever has transformers' default.
"""

from __future__ import annotations

from pals.models.config import AttentionConfig, RopeConfig
from pals.models.configs.dense import DenseConfig
from pals.models.configs.reader import (
    MAX_INTERMEDIATE_SIZE,
    MAX_LAYERS,
    MAX_POSITIONS,
    ConfigReader,
)
from pals.models.configs.rope import read_rope_table
from pals.models.configs.shared import Heads, read_common, read_heads, read_layer_types

DEFAULTS: dict[str, object] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "eos_token_id": 1,
}
DEFAULT_SLIDING_WINDOW_PATTERN = 6
GLOBAL_THETA, LOCAL_THETA = 1_000_000.0, 10_000.0
GLOBAL_ROPE, LOCAL_ROPE = 0, 1
"""Places in `ModelConfig.rope`."""

IMAGE_KEYS = (
    "boi_token_id",
    "boi_token_index",
    "eoi_token_id",
    "eoi_token_index",
    "image_token_id",
    "image_token_index",
    "mm_tokens_per_image",
    "vision_config",
)


def read_multimodal(reader: ConfigReader) -> DenseConfig:
    """Read the text part of a config of model_type ``gemma3``."""
    text = reader.table("text_config")
    if text is None:
        raise reader.corrupt("`text_config` is missing")
    text.expect("model_type", "gemma3_text")
    # what is said of the whole model counts, since the whole model was trained and saved
    whole: dict[str, object] = {
        "tie_word_embeddings": reader.boolean("tie_word_embeddings", default=True)
    }
    if reader.take("eos_token_id") is not None:
        whole["eos_token_id"] = reader.take("eos_token_id")
    reader.refuse_unknown(*IMAGE_KEYS)
    return read(ConfigReader({**text.values, **whole}, text.source, {"model_type"}))


def read(reader: ConfigReader) -> DenseConfig:
    """Read a config of model_type ``gemma3_text``."""
    reader = ConfigReader({**DEFAULTS, **reader.values}, reader.source, reader.taken)
    reader.expect("hidden_activation", "gelu_pytorch_tanh")
    reader.expect("use_bidirectional_attention", False)
    common = read_common(reader, positions=131_072, tied=True)
    heads = read_heads(reader, common["hidden_size"])
    config = DenseConfig(
        family="gemma3",
        **common,
        rope=read_ropes(reader, width=heads.head_dim, positions=common["max_position_embeddings"]),
        intermediate_size=reader.integer("intermediate_size", MAX_INTERMEDIATE_SIZE),
        mlp_bias=False,
        attention=read_attention(reader, heads, common["num_layers"]),
        embedding_scale=common["hidden_size"] ** 0.5,
        norm_offset=1.0,
        final_logit_softcap=reader.optional_number("final_logit_softcapping"),
    )
    # transformers reads `attn_logit_softcapping` and then never applies it
    reader.refuse_unknown("_sliding_window_pattern", "architectures", "attn_logit_softcapping")
    return config


def read_attention(
    reader: ConfigReader, heads: Heads, num_layers: int
) -> tuple[AttentionConfig, ...]:
    """Return the attention of each layer: some local ones, then a global one, and so on."""
    pattern = reader.integer(
        "sliding_window_pattern", MAX_LAYERS, default=DEFAULT_SLIDING_WINDOW_PATTERN
    )
    default = [(layer + 1) % pattern != 0 for layer in range(num_layers)]
    slides = read_layer_types(reader, num_layers, default)
    window = reader.optional_integer("sliding_window", MAX_POSITIONS)
    if any(slides) and window is None:
        raise reader.corrupt("layers slide, but `sliding_window` is null")
    bias = reader.boolean("attention_bias")
    scale = reader.number("query_pre_attn_scalar", default=256) ** -0.5
    return tuple(
        AttentionConfig(
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
            scale=scale,
            qkv_bias=bias,
            output_bias=bias,
            qk_norm=True,
            window=window if slide else None,
            rope=LOCAL_ROPE if slide else GLOBAL_ROPE,
        )
        for slide in slides
    )


def read_ropes(reader: ConfigReader, *, width: int, positions: int) -> tuple[RopeConfig, ...]:
    """Return the rotary tables of global and of local layers.

    transformers 5 has a table for each type of layer in ``rope_parameters``; transformers 4
    has ``rope_theta`` and ``rope_scaling`` of global layers, ``rope_local_base_freq`` of
    local ones.
    """
    thetas = (
        reader.number("rope_theta", default=GLOBAL_THETA),
        reader.number("rope_local_base_freq", default=LOCAL_THETA),
    )
    old = reader.table("rope_scaling")
    both = reader.table("rope_parameters")
    if both is None:
        tables = (old, None)
    else:
        tables = (both.table("full_attention"), both.table("sliding_attention"))
        both.refuse_unknown()
    none = ConfigReader({}, reader.source)
    return tuple(
        read_rope_table(table or none, width=width, positions=positions, theta=theta)
        for table, theta in zip(tables, thetas, strict=True)
    )
