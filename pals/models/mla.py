# pyright: reportUnknownMemberType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""Multi-head latent attention over its compressed cache.

A token leaves one latent and one turned key in the cache, which all heads share. Queries
are taken into the space of the latents and the mix of latents is taken out of it, so that
no step expands what is cached: heads attend as N queries over a single key head, whose
values are the first part of its keys. That costs more multiplications than expanded keys
for chunks beyond some hundred tokens, but memory that does not grow with N. Several
devices divide the heads; the latents, which all heads read, each of them has whole.

Source: https://arxiv.org/abs/2405.04434, section 2.1, and modeling_deepseek_v3.py.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from pals.models.config import LatentAttentionConfig, ModelConfig
from pals.models.layers import Linear, RMSNorm
from pals.models.numerics import Numerics
from pals.models.paged import LayerCache, Rows, update_cache
from pals.models.rope import RopeTable, pair_halves, rotate
from pals.models.spread import check_divides
from pals.models.walk import View, attend, batched_matmul

LATENT_EPS = 1e-6
"""Of the norms over compressed queries and latents, whatever ``rms_norm_eps`` is."""


class LatentAttention(nnx.Module):
    """Self-attention whose keys and values follow from a latent; see `LatentAttentionConfig`."""

    def __init__(
        self, config: ModelConfig, attention: LatentAttentionConfig, numerics: Numerics
    ) -> None:
        hidden_size, bias = config.hidden_size, attention.bias
        q_size, q_rank = attention.num_heads * attention.qk_head_dim, attention.q_lora_rank
        check_divides(attention.num_heads, "attention heads", numerics.devices)
        linear = partial(Linear, numerics=numerics)
        if q_rank is None:
            self.q_proj = linear(hidden_size, q_size, bias=False, split="outputs")
        else:
            self.q_a_proj = linear(hidden_size, q_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(q_rank, eps=LATENT_EPS, numerics=numerics)
            self.q_b_proj = linear(q_rank, q_size, bias=False, split="outputs")
        self.kv_a_proj_with_mqa = linear(hidden_size, attention.latent_size, bias=bias)
        self.kv_a_layernorm = RMSNorm(attention.kv_lora_rank, eps=LATENT_EPS, numerics=numerics)
        self.kv_b_proj = LatentUpProjection(attention, numerics)
        v_size = attention.num_heads * attention.v_head_dim
        self.o_proj = linear(v_size, hidden_size, bias=bias, split="inputs")
        self.platform = numerics.platform
        self.config = attention

    def __call__(self, x: jax.Array, cache: LayerCache, rows: Rows) -> tuple[jax.Array, LayerCache]:
        """Map [M, D] to [M, D], having written these tokens to the cache."""
        with jax.named_scope("latent_attention"):
            table = rows.rope[self.config.rope]
            queries = self.latent_queries(x, table)
            cache = update_cache(cache, (self.latents(x, table),), rows, self.platform)
            view = View(scale=self.config.scale, value_width=self.config.kv_lora_rank)
            mixed = attend(queries, cache, rows, view)
            values = self.kv_b_proj.expand_values(mixed)
            return self.o_proj(values.reshape(x.shape[0], -1)), cache

    def latent_queries(self, x: jax.Array, table: RopeTable) -> jax.Array:
        """Return the queries [M, N, R] of [M, D], laid out as `latents` are."""
        if self.config.q_lora_rank is None:
            queries = self.q_proj(x)
        else:
            queries = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        queries = queries.reshape(x.shape[0], -1, self.config.qk_head_dim)
        still, turning = jnp.split(queries, [self.config.qk_nope_head_dim], axis=-1)
        absorbed = self.kv_b_proj.absorb_queries(still)
        return jnp.concatenate([absorbed, self._turn(turning, table)], axis=-1)

    def latents(self, x: jax.Array, table: RopeTable) -> jax.Array:
        """Return what is kept of [M, D]: latent, then turned key, [M, 1, R]."""
        compressed = self.kv_a_proj_with_mqa(x)[:, None]
        latent, key = jnp.split(compressed, [self.config.kv_lora_rank], axis=-1)
        return jnp.concatenate([self.kv_a_layernorm(latent), self._turn(key, table)], axis=-1)

    def _turn(self, heads: jax.Array, table: RopeTable) -> jax.Array:
        return rotate(pair_halves(heads) if self.config.interleaved else heads, table)


class LatentUpProjection(nnx.Module):
    """From a latent to the keys and values of each head, used from either side.

    It is a small part of a layer and stands between two roundings: it is not quantised.
    """

    def __init__(self, attention: LatentAttentionConfig, numerics: Numerics) -> None:
        rows = attention.num_heads * (attention.qk_nope_head_dim + attention.v_head_dim)
        shape = (rows, attention.kv_lora_rank)
        self.weight = nnx.Param(jnp.zeros(shape, numerics.compute), split_axis=0)
        self.key_size = attention.qk_nope_head_dim
        self.head_size = attention.qk_nope_head_dim + attention.v_head_dim

    def absorb_queries(self, queries: jax.Array) -> jax.Array:
        """Map [M, N, H] to what scores the same against latents, [M, N, R]."""
        return _per_head(queries, self._matrices()[:, : self.key_size], contract=1)

    def expand_values(self, latents: jax.Array) -> jax.Array:
        """Map each head's latent [M, N, R] to its value [M, N, H]."""
        return _per_head(latents, self._matrices()[:, self.key_size :], contract=2)

    def _matrices(self) -> jax.Array:
        """Return keys above values of each head, [N, _, R]."""
        matrix = self.weight[...]
        return matrix.reshape(-1, self.head_size, matrix.shape[-1])


def _per_head(x: jax.Array, matrices: jax.Array, *, contract: int) -> jax.Array:
    """Multiply heads [M, N, _] by their matrices [N, _, _] over their axis ``contract``."""
    product = batched_matmul(x.swapaxes(0, 1), matrices, contract=contract)
    return product.astype(x.dtype).swapaxes(0, 1)
