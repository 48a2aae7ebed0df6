# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""The part of a decoder-only model that one shard holds, for every family."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from pals.models.attention import LayerCache, Rows, make_rows
from pals.models.config import ModelConfig
from pals.models.layers import Embedding, RMSNorm, softcap
from pals.models.numerics import Numerics
from pals.types import LayerRange

Cache = tuple[LayerCache, ...]


class DecoderLayer(Protocol):
    """What a family's layer module does."""

    def __call__(
        self, x: jax.Array, cache: LayerCache, rows: Rows, *, context: int
    ) -> tuple[jax.Array, LayerCache]:
        """Map [B, T, D] to [B, T, D], having written these tokens to the cache."""
        ...


BuildLayer = Callable[[ModelConfig, int, Numerics], DecoderLayer]
"""Makes a family's layer of a number."""


@partial(jax.jit, static_argnames="context")
def run_layer(
    layer: DecoderLayer, x: jax.Array, cache: LayerCache, rows: Rows, *, context: int
) -> tuple[jax.Array, LayerCache]:
    """Run one layer; jitted so that equal layers are traced once, not each."""
    return layer(x, cache, rows, context=context)


class Decoder(nnx.Module):
    """Embedding, layers, final norm and head, as far as they are in the range.

    The embedding is there only when the range starts at layer 0, the final norm and the
    head only when it ends at the last. A tied head at a tail that is not the head too is
    an `Embedding` of its own, named ``lm_head``.
    """

    def __init__(
        self, config: ModelConfig, layers: LayerRange, numerics: Numerics, build: BuildLayer
    ) -> None:
        self.config = config
        self.first_layer = layers.start
        is_head = layers.start == 0
        is_tail = layers.stop == config.num_layers
        ends = (config.vocab_size, config.hidden_size)
        self.embed_tokens = Embedding(*ends, numerics=numerics) if is_head else None
        self.layers = nnx.List(
            [build(config, layer, numerics) for layer in range(layers.start, layers.stop)]
        )
        self.norm = model_norm(config, numerics) if is_tail else None
        tied_here = config.tie_word_embeddings and is_head
        self.lm_head = Embedding(*ends, numerics=numerics) if is_tail and not tied_here else None

    def __call__(
        self,
        inputs: jax.Array,
        cache: Cache,
        *,
        slots: jax.Array,
        starts: jax.Array,
        context: int,
        lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Run the layers over some rows of tokens.

        Args:
            inputs: Token ids [B, T] at the head, hidden states [B, T, D] elsewhere.
            cache: One entry for each layer of this shard.
            slots: [B] int32, the cache slot of each row.
            starts: [B] int32, the position of each row's first token.
            context: Positions of the cache to attend to; covers every row.
            lengths: [B] int32, how many tokens of each row are no padding; None for all.

        Returns:
            Hidden states [B, T, D] before the final norm, and the new cache.
        """
        x = inputs if self.embed_tokens is None else self.embed(inputs)
        rows = make_rows(self.config, slots, starts, x.shape[1], lengths)
        new_cache: list[LayerCache] = []
        for number, (layer, layer_cache) in enumerate(zip(self.layers, cache, strict=True)):
            with jax.named_scope(f"layer_{self.first_layer + number}"):
                x, layer_cache = run_layer(layer, x, layer_cache, rows, context=context)
            new_cache.append(layer_cache)
        return x, tuple(new_cache)

    def embed(self, token_ids: jax.Array) -> jax.Array:
        """Look up [B, T] ids; returns [B, T, D]."""
        assert self.embed_tokens is not None
        x = self.embed_tokens(token_ids)
        if self.config.embedding_scale == 1.0:
            return x
        return x * jnp.asarray(self.config.embedding_scale, x.dtype)

    def forward_logits(self, x: jax.Array) -> jax.Array:
        """Turn the last layer's hidden states [M, D] into float32 logits [M, V]."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        if self.norm is None or head is None:
            raise ValueError("only the tail of a model has logits")
        with jax.named_scope("lm_head"):
            logits = head.attend(self.norm(x))
            cap = self.config.final_logit_softcap
            return logits if cap is None else softcap(logits, cap)


def model_norm(config: ModelConfig, numerics: Numerics) -> RMSNorm:
    """Return a norm over hidden states, as the model has it everywhere."""
    return RMSNorm(
        config.hidden_size,
        eps=config.rms_norm_eps,
        numerics=numerics,
        offset=config.norm_offset,
    )
