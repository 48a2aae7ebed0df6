# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""Llama (https://arxiv.org/abs/2302.13971; transformers: modeling_llama.py), by layers."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from pals.models.attention import Attention, LayerCache, Rows, make_rows
from pals.models.config import ModelConfig
from pals.models.layers import Embedding, GatedMLP, RMSNorm
from pals.types import LayerRange

Cache = tuple[LayerCache, ...]


class LlamaLayer(nnx.Module):
    """One decoder layer: attention and MLP, each after a norm and around a residual."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype) -> None:
        eps = config.rms_norm_eps
        self.input_layernorm = RMSNorm(config.hidden_size, eps=eps, dtype=dtype)
        self.self_attn = Attention(config, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=eps, dtype=dtype)
        self.mlp = GatedMLP(
            config.hidden_size, config.intermediate_size, bias=config.mlp_bias, dtype=dtype
        )


@partial(jax.jit, static_argnames="context")
def run_layer(
    layer: LlamaLayer, x: jax.Array, cache: LayerCache, rows: Rows, *, context: int
) -> tuple[jax.Array, LayerCache]:
    """Map [B, T, D] to [B, T, D]; jitted so that equal layers are traced once, not each."""
    mixed, cache = layer.self_attn(layer.input_layernorm(x), cache, rows, context=context)
    x = x + mixed
    return x + layer.mlp(layer.post_attention_layernorm(x)), cache


class Llama(nnx.Module):
    """The part of a Llama model that one shard holds.

    The embedding is there only when the range starts at layer 0, the final norm and the
    head only when it ends at the last. A tied head at a tail that is not the head too is
    an `Embedding` of its own, named ``lm_head``.
    """

    def __init__(self, config: ModelConfig, layers: LayerRange, *, dtype: jnp.dtype) -> None:
        self.config = config
        self.first_layer = layers.start
        is_head = layers.start == 0
        is_tail = layers.stop == config.num_layers
        ends = (config.vocab_size, config.hidden_size)
        self.embed_tokens = Embedding(*ends, dtype=dtype) if is_head else None
        self.layers = nnx.List([LlamaLayer(config, dtype=dtype) for _ in range(len(layers))])
        self.norm = (
            RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype) if is_tail else None
        )
        tied_here = config.tie_word_embeddings and is_head
        self.lm_head = Embedding(*ends, dtype=dtype) if is_tail and not tied_here else None

    def __call__(
        self,
        inputs: jax.Array,
        cache: Cache,
        *,
        slots: jax.Array,
        starts: jax.Array,
        context: int,
    ) -> tuple[jax.Array, Cache]:
        """Run the layers over some rows of tokens.

        Args:
            inputs: Token ids [B, T] at the head, hidden states [B, T, D] elsewhere.
            cache: One entry for each layer of this shard.
            slots: [B] int32, the cache slot of each row.
            starts: [B] int32, the position of each row's first token.
            context: Positions of the cache to attend to; covers every row.

        Returns:
            Hidden states [B, T, D] before the final norm, and the new cache.
        """
        x = inputs if self.embed_tokens is None else self.embed_tokens(inputs)
        rows = make_rows(self.config, slots, starts, x.shape[1])
        new_cache: list[LayerCache] = []
        for number, (layer, layer_cache) in enumerate(zip(self.layers, cache, strict=True)):
            with jax.named_scope(f"layer_{self.first_layer + number}"):
                x, layer_cache = run_layer(layer, x, layer_cache, rows, context=context)
            new_cache.append(layer_cache)
        return x, tuple(new_cache)

    def forward_logits(self, x: jax.Array) -> jax.Array:
        """Turn the last layer's hidden states [M, D] into float32 logits [M, V]."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        if self.norm is None or head is None:
            raise ValueError("only the tail of a model has logits")
        with jax.named_scope("lm_head"):
            return head.attend(self.norm(x))
