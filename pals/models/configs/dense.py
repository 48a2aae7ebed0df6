"""The config of dense families whose layers differ in switches only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pals.models.config import AttentionConfig, ModelConfig
from pals.models.configs.reader import (
    MAX_INTERMEDIATE_SIZE,
    MAX_POSITIONS,
    ConfigReader,
)
from pals.models.configs.rope import read_rope
from pals.models.configs.shared import CommonFields, Heads, read_layer_types


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseConfig(ModelConfig):
    """A decoder whose layers are attention and a gated MLP, each after a norm."""

    intermediate_size: int
    mlp_bias: bool
    attention: tuple[AttentionConfig, ...]

    def layer_parameters(self, layer: int) -> int:
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.attention[layer].parameters(self.hidden_size) + mlp


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSwitches:
    """How the attention of one family differs from plain grouped-query attention.

    Attributes:
        windows: The window of each layer, or None.
    """

    windows: Sequence[int | None]
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    sinks: bool = False


def build_dense(
    reader: ConfigReader,
    common: CommonFields,
    heads: Heads,
    switches: AttentionSwitches,
    *,
    family: str,
    mlp_bias: bool = False,
) -> DenseConfig:
    """Read what is left of a dense config and put it together."""
    return DenseConfig(
        family=family,
        **common,
        rope=(
            read_rope(reader, width=heads.head_dim, positions=common["max_position_embeddings"]),
        ),
        intermediate_size=reader.integer("intermediate_size", MAX_INTERMEDIATE_SIZE),
        mlp_bias=mlp_bias,
        attention=build_attention(heads, switches),
    )


def build_attention(heads: Heads, switches: AttentionSwitches) -> tuple[AttentionConfig, ...]:
    """Return the attention of each layer, which differ in their windows only."""
    return tuple(
        AttentionConfig(
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
            scale=heads.head_dim**-0.5,
            qkv_bias=switches.qkv_bias,
            output_bias=switches.output_bias,
            qk_norm=switches.qk_norm,
            window=window,
            sinks=switches.sinks,
        )
        for window in switches.windows
    )


def read_qwen_windows(reader: ConfigReader, num_layers: int) -> list[int | None]:
    """Return the windows of Qwen's layers, whose sliding ones are off unless asked for.

    Source: ``Qwen2Config.__post_init__`` in transformers.
    """
    is_on = reader.boolean("use_sliding_window")
    window = reader.optional_integer("sliding_window", MAX_POSITIONS)
    first = reader.integer("max_window_layers", MAX_POSITIONS, default=28, least=0)
    slides = [is_on and window is not None and layer >= first for layer in range(num_layers)]
    slides = read_layer_types(reader, num_layers, slides)
    if any(slides) and not (is_on and window):
        raise reader.corrupt("`layer_types` slides, but there is no window")
    return [window if slide else None for slide in slides]
