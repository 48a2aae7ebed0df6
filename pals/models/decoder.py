# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""The part of a decoder-only model that one shard holds, for every family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from pals.models.config import ModelConfig
from pals.models.layers import Embedding, RMSNorm, softcap
from pals.models.numerics import Numerics
from pals.models.paged import LayerCache, Rows, StepShape, Tables, make_rows
from pals.types import LayerRange

Cache = tuple[LayerCache, ...]


class DecoderLayer(Protocol):
    """What a family's layer module does."""

    def __call__(self, x: jax.Array, cache: LayerCache, rows: Rows) -> tuple[jax.Array, LayerCache]:
        """Map [M, D] to [M, D], having written these tokens to the cache."""
        ...


BuildLayer = Callable[[ModelConfig, int, Numerics], DecoderLayer]
"""Makes a family's layer of a number."""


@jax.jit
def run_layer(
    layer: DecoderLayer, x: jax.Array, cache: LayerCache, rows: Rows
) -> tuple[jax.Array, LayerCache]:
    """Run one layer; jitted so that equal layers are traced once, not each."""
    return layer(x, cache, rows)


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
        self, inputs: jax.Array, cache: Cache, shape: StepShape, tables: Tables
    ) -> tuple[jax.Array, Cache]:
        """Run the layers over the tokens of a step.

        Args:
            inputs: Token ids [M] at the head, hidden states [M, D] elsewhere.
            cache: One entry for each layer of this shard.
            shape: How the tokens are divided into rows.
            tables: Where the rows stand.

        Returns:
            Hidden states [M, D] before the final norm, and the new cache.
        """
        x = inputs if self.embed_tokens is None else self.embed(inputs)
        rows = make_rows(self.config, shape, tables)
        new_cache: list[LayerCache] = []
        for number, (layer, layer_cache) in enumerate(zip(self.layers, cache, strict=True)):
            with jax.named_scope(f"layer_{self.first_layer + number}"):
                x, layer_cache = run_layer(layer, x, layer_cache, rows)
            new_cache.append(layer_cache)
        return x, tuple(new_cache)

    def embed(self, token_ids: jax.Array) -> jax.Array:
        """Look up [M] ids; returns [M, D]."""
        assert self.embed_tokens is not None
        x = self.embed_tokens(token_ids)
        if self.config.embedding_scale == 1.0:
            return x
        return x * jnp.asarray(self.config.embedding_scale, x.dtype)

    def forward_logits(self, x: jax.Array) -> jax.Array:
        """Turn the last layer's hidden states [M, D] into float32 logits [M, V]."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        if head is None:
            raise ValueError("only the tail of a model has logits")
        with jax.named_scope("lm_head"):
            logits = head.attend(self.normalise(x))
            cap = self.config.final_logit_softcap
            return logits if cap is None else softcap(logits, cap)

    def normalise(self, x: jax.Array) -> jax.Array:
        """Return the last layer's hidden states [M, D] after the final norm."""
        if self.norm is None:
            raise ValueError("only the tail of a model has the final norm")
        return self.norm(x)


def model_norm(config: ModelConfig, numerics: Numerics) -> RMSNorm:
    """Return a norm over hidden states, as the model has it everywhere."""
    return RMSNorm(
        config.hidden_size,
        eps=config.rms_norm_eps,
        numerics=numerics,
        offset=config.norm_offset,
    )
