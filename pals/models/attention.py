# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""Self-attention with grouped key and value heads, as most families have it."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from pals.models.config import AttentionConfig, ModelConfig
from pals.models.kernels.choice import attend_by
from pals.models.layers import Linear, RMSNorm
from pals.models.numerics import AttentionKernel, Numerics
from pals.models.paged import LayerCache, Rows, update_cache
from pals.models.rope import rotate
from pals.models.spread import Split, check_divides, heads_of_device, own_heads
from pals.models.walk import View


class Attention(nnx.Module):
    """Self-attention with grouped key and value heads; see `AttentionConfig`."""

    def __init__(self, config: ModelConfig, attention: AttentionConfig, numerics: Numerics) -> None:
        hidden_size, bias = config.hidden_size, attention.qkv_bias
        q_size, kv_size = attention.q_size, attention.kv_size
        self.devices = numerics.devices
        check_divides(attention.num_heads, "attention heads", self.devices)
        held = heads_of_device(attention.num_kv_heads, self.devices)
        # Devices that share a key head have the few matrices of all of them.
        self.shares_keys = held * self.devices > attention.num_kv_heads
        kv_split: Split | None = None if self.shares_keys else "outputs"
        linear = partial(Linear, numerics=numerics)
        self.q_proj = linear(hidden_size, q_size, bias=bias, split="outputs")
        self.k_proj = linear(hidden_size, kv_size, bias=bias, split=kv_split)
        self.v_proj = linear(hidden_size, kv_size, bias=bias, split=kv_split)
        self.o_proj = linear(q_size, hidden_size, bias=attention.output_bias, split="inputs")
        self.q_norm = _head_norm(config, attention, numerics)
        self.k_norm = _head_norm(config, attention, numerics)
        self.sinks = (
            nnx.Param(jnp.zeros((attention.num_heads,), numerics.compute), split_axis=0)
            if attention.sinks
            else None
        )
        self.platform = numerics.platform
        self.kernel: AttentionKernel = numerics.attention
        self.config = attention

    def __call__(self, x: jax.Array, cache: LayerCache, rows: Rows) -> tuple[jax.Array, LayerCache]:
        """Map [M, D] to [M, D], having written these tokens to the cache."""
        with jax.named_scope("attention"):
            heads = (x.shape[0], -1, self.config.head_dim)
            queries = self.q_proj(x).reshape(heads)
            keys, values = self.k_proj(x).reshape(heads), self.v_proj(x).reshape(heads)
            if self.shares_keys:
                keys, values = own_heads(keys, self.devices), own_heads(values, self.devices)
            if self.q_norm is not None and self.k_norm is not None:
                queries, keys = self.q_norm(queries), self.k_norm(keys)
            table = rows.rope[self.config.rope]
            news = (rotate(keys, table), values)
            cache = update_cache(cache, news, rows, self.platform)
            view = View(
                scale=self.config.scale,
                window=self.config.window,
                sinks=None if self.sinks is None else self.sinks[...],
            )
            mixed = attend_by(self.kernel, rotate(queries, table), cache, rows, view)
            return self.o_proj(mixed.reshape(x.shape[0], -1)), cache


def _head_norm(
    config: ModelConfig, attention: AttentionConfig, numerics: Numerics
) -> RMSNorm | None:
    if not attention.qk_norm:
        return None
    return RMSNorm(
        attention.head_dim,
        eps=config.rms_norm_eps,
        numerics=numerics,
        offset=config.norm_offset,
    )
