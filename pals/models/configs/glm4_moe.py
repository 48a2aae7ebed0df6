"""GLM-4.5, 4.5-Air and 4.6 (https://arxiv.org/abs/2508.06471; configuration_glm4_moe.py)."""

from __future__ import annotations

from pals.models.configs.dense import AttentionSwitches, build_attention
from pals.models.configs.moe import SparseConfig
from pals.models.configs.reader import ConfigReader
from pals.models.configs.rope import read_partial_width, read_rope
from pals.models.configs.shared import read_common, read_heads
from pals.models.configs.shared_moe import SharedMoEDefaults, read_shared_moe

DEFAULT_ROTARY_FACTOR = 0.5
DEFAULTS = SharedMoEDefaults(
    num_groups=1, topk_groups=1, routed_scaling_factor=1.0, num_dense_layers=1
)


def read(reader: ConfigReader) -> SparseConfig:
    """Read a config of model_type ``glm4_moe``."""
    reader.expect("hidden_act", "silu")
    common = read_common(reader, positions=131072, eps=1e-5)
    num_layers = common["num_layers"]
    heads = read_heads(reader, common["hidden_size"])
    rope = read_rope(
        reader,
        width=read_partial_width(reader, heads.head_dim, default=DEFAULT_ROTARY_FACTOR),
        positions=common["max_position_embeddings"],
    )
    switches = AttentionSwitches(
        windows=[None] * num_layers,
        qkv_bias=reader.boolean("attention_bias"),
        qk_norm=reader.boolean("use_qk_norm"),
    )
    config = SparseConfig(
        family="glm4_moe",
        **common,
        rope=(rope,),
        attention=build_attention(heads, switches),
        **read_shared_moe(reader, num_layers, DEFAULTS),
    )
    reader.refuse_unknown()
    return config
