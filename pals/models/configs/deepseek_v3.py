"""DeepSeek V3, V3.1, R1 and Kimi K2 (https://arxiv.org/abs/2412.19437).

Source: configuration_deepseek_v3.py and modeling_deepseek_v3.py of transformers.
"""

from __future__ import annotations

from pals.models.config import LatentAttentionConfig, RopeConfig, YarnScaling
from pals.models.configs.moe import SparseConfig
from pals.models.configs.reader import MAX_HEAD_DIM, MAX_HEADS, MAX_HIDDEN_SIZE, ConfigReader
from pals.models.configs.rope import read_rope, yarn_mscale
from pals.models.configs.shared import read_common
from pals.models.configs.shared_moe import SharedMoEDefaults, read_shared_moe

INERT_KEYS = ("aux_loss_alpha", "ep_size", "pretraining_tp", "seq_aux")
DEFAULTS = SharedMoEDefaults(
    num_groups=8, topk_groups=4, routed_scaling_factor=2.5, num_dense_layers=3
)


def read(reader: ConfigReader) -> SparseConfig:
    """Read a config of model_type ``deepseek_v3`` or ``kimi_k2``."""
    reader.expect("hidden_act", "silu")
    common = read_common(reader, positions=4096)
    num_layers = common["num_layers"]
    rope = read_rope(
        reader,
        width=reader.integer("qk_rope_head_dim", MAX_HEAD_DIM),
        positions=common["max_position_embeddings"],
    )
    config = SparseConfig(
        family="deepseek_v3",
        **common,
        rope=(rope,),
        **read_shared_moe(reader, num_layers, DEFAULTS),
        attention=(_read_attention(reader, rope),) * num_layers,
    )
    reader.refuse_unknown(*INERT_KEYS)
    return config


def _read_attention(reader: ConfigReader, rope: RopeConfig) -> LatentAttentionConfig:
    num_heads = reader.integer("num_attention_heads", MAX_HEADS)
    nope = reader.integer("qk_nope_head_dim", MAX_HEAD_DIM)
    reader.expect("num_key_value_heads", num_heads)
    reader.expect("head_dim", rope.width)
    reader.expect("qk_head_dim", nope + rope.width)
    return LatentAttentionConfig(
        num_heads=num_heads,
        q_lora_rank=reader.optional_integer("q_lora_rank", MAX_HIDDEN_SIZE),
        kv_lora_rank=reader.integer("kv_lora_rank", MAX_HIDDEN_SIZE),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope.width,
        v_head_dim=reader.integer("v_head_dim", MAX_HEAD_DIM),
        bias=reader.boolean("attention_bias"),
        interleaved=reader.boolean("rope_interleave", default=True),
        scale=(nope + rope.width) ** -0.5 * _yarn_growth(reader, rope),
    )


def _yarn_growth(reader: ConfigReader, rope: RopeConfig) -> float:
    """Return what scores grow by under YaRN; source: ``yarn_apply_mscale``."""
    table = reader.table("rope_parameters") or reader.table("rope_scaling")
    if table is None or not isinstance(rope.scaling, YarnScaling):
        return 1.0
    mscale_all_dim = table.optional_number("mscale_all_dim")
    return 1.0 if mscale_all_dim is None else yarn_mscale(rope.scaling.factor, mscale_all_dim) ** 2
