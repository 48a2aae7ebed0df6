"""Gemma 3, text only (https://arxiv.org/abs/2503.19786; transformers: modeling_gemma3.py)."""

from __future__ import annotations

import jax
from flax import nnx

from pals.models.attention import Attention
from pals.models.configs.dense import DenseConfig
from pals.models.decoder import model_norm
from pals.models.family import Family
from pals.models.layers import GatedMLP
from pals.models.numerics import Numerics
from pals.models.paged import LayerCache, Rows
from pals.models.table import Root, WeightTable


class Gemma3Layer(nnx.Module):
    """One decoder layer: attention and a gated MLP, each between two norms."""

    def __init__(self, config: DenseConfig, layer: int, numerics: Numerics) -> None:
        self.input_layernorm = model_norm(config, numerics)
        self.self_attn = Attention(config, config.attention[layer], numerics)
        self.post_attention_layernorm = model_norm(config, numerics)
        self.pre_feedforward_layernorm = model_norm(config, numerics)
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            activation="gelu_tanh",
            numerics=numerics,
        )
        self.post_feedforward_layernorm = model_norm(config, numerics)

    def __call__(self, x: jax.Array, cache: LayerCache, rows: Rows) -> tuple[jax.Array, LayerCache]:
        """Map [M, D] to [M, D], having written these tokens to the cache."""
        mixed, cache = self.self_attn(self.input_layernorm(x), cache, rows)
        x = x + self.post_attention_layernorm(mixed)
        fed = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(fed), cache


FAMILY = Family(
    build_layer=Gemma3Layer,
    weights=WeightTable(
        roots=(
            Root(),
            Root(model="language_model.model.", head="language_model.lm_head."),
            Root(model="model.language_model."),
        ),
        unused=(r"(model\.)?(vision_tower|multi_modal_projector)\..+",),
    ),
)
