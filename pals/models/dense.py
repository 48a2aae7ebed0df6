"""The layer of the dense families: attention and a gated MLP, each after a norm."""

from __future__ import annotations

import jax
from flax import nnx

from pals.models.attention import Attention
from pals.models.configs.dense import DenseConfig
from pals.models.decoder import model_norm
from pals.models.layers import GatedMLP
from pals.models.numerics import Numerics
from pals.models.paged import LayerCache, Rows


class DenseLayer(nnx.Module):
    """One decoder layer, whose parts stand around a residual."""

    def __init__(self, config: DenseConfig, layer: int, numerics: Numerics) -> None:
        self.input_layernorm = model_norm(config, numerics)
        self.self_attn = Attention(config, config.attention[layer], numerics)
        self.post_attention_layernorm = model_norm(config, numerics)
        self.mlp = GatedMLP(
            config.hidden_size, config.intermediate_size, bias=config.mlp_bias, numerics=numerics
        )

    def __call__(self, x: jax.Array, cache: LayerCache, rows: Rows) -> tuple[jax.Array, LayerCache]:
        """Map [M, D] to [M, D], having written these tokens to the cache."""
        mixed, cache = self.self_attn(self.input_layernorm(x), cache, rows)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), cache
