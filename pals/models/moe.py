# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""A mixture of experts in the place of an MLP (https://arxiv.org/abs/1701.06538)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax.experimental import io_callback

from pals.models.attention import Attention
from pals.models.config import LatentAttentionConfig
from pals.models.configs.moe import MoEConfig, SparseConfig
from pals.models.decoder import model_norm
from pals.models.experts import ClampedSwiGLU, Experts, swiglu
from pals.models.layers import GatedMLP
from pals.models.mla import LatentAttention
from pals.models.moe_options import RoutingHook, RoutingRecord
from pals.models.numerics import Numerics
from pals.models.paged import LayerCache, Rows
from pals.models.router import Router, Routing
from pals.models.spread import device_number
from pals.models.table import Fused, PerExpert, WeightTable

SPARSE_WEIGHTS = WeightTable(
    layer={
        "mlp.experts.gate_up_proj.weight": (
            PerExpert("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
            Fused("mlp.experts.gate_up_proj"),
        ),
        "mlp.experts.down_proj.weight": (
            PerExpert("mlp.experts.{}.down_proj.weight"),
            Fused("mlp.experts.down_proj"),
        ),
    }
)
"""Of most families; the second spelling is that of transformers 5's own state dicts."""


class MoE(nnx.Module):
    """Router, experts and, in some families, a shared expert that every token takes.

    Args:
        config: Of this layer.
        hidden_size: D.
        layer: The layer's number in the whole model, for the trace.
        numerics: Holds the `MoEOptions` of the run.
    """

    def __init__(self, config: MoEConfig, hidden_size: int, layer: int, numerics: Numerics) -> None:
        router = numerics.moe.override.apply(config.router)
        limit, alpha = config.swiglu_limit, config.swiglu_alpha
        self.gate = Router(router, hidden_size, numerics=numerics)
        self.experts = Experts(
            router.num_experts,
            hidden_size,
            config.intermediate_size,
            activation=swiglu if limit is None else ClampedSwiGLU(alpha=alpha, limit=limit),
            bias=config.bias,
            numerics=numerics,
        )
        shared = config.shared_intermediate_size
        self.shared_experts = (
            None if shared is None else GatedMLP(hidden_size, shared, numerics=numerics)
        )
        hook = numerics.moe.trace
        # Without a trace, layers that differ in their number only stay one program.
        self.devices = numerics.devices
        self.deliver = None if hook is None else recorder(hook, layer, router.num_experts)

    def __call__(self, x: jax.Array, rows: jax.Array | None = None) -> jax.Array:
        """Map [M, D] to [M, D].

        Args:
            x: Hidden states.
            rows: [M] booleans, False for padding: its result is undefined, it wakes no
                expert and leaves no trace. None means that all tokens count.
        """
        with jax.named_scope("moe"):
            routing = self.gate(x)
            if self.deliver is not None:
                io_callback(self.deliver, None, device_number(self.devices), routing, rows)
            mixed = self.experts(x, routing, rows).astype(x.dtype)
            return mixed if self.shared_experts is None else mixed + self.shared_experts(x)


def recorder(
    hook: RoutingHook, layer: int, num_experts: int
) -> Callable[[jax.Array | int, Routing, jax.Array | None], None]:
    """Return what hands the choices of a layer to ``hook`` on the host, from one device."""

    def deliver(device: jax.Array | int, routing: Routing, rows: jax.Array | None) -> None:
        if device:
            return
        ids, weights = np.asarray(routing.expert_ids), np.asarray(routing.weights)
        if rows is not None:
            counted = np.asarray(rows)
            ids, weights = ids[counted], weights[counted]
        load = np.bincount(ids.ravel(), minlength=num_experts).astype(np.int64)
        hook(RoutingRecord(layer=layer, expert_ids=ids, weights=weights, load=load))

    return deliver


def build_attention(
    config: SparseConfig, layer: int, numerics: Numerics
) -> Attention | LatentAttention:
    """Return the attention of a layer, whose config names its kind."""
    attention = config.attention[layer]
    if isinstance(attention, LatentAttentionConfig):
        return LatentAttention(config, attention, numerics)
    return Attention(config, attention, numerics)


class SparseLayer(nnx.Module):
    """A decoder layer whose MLP may be a mixture of experts."""

    def __init__(self, config: SparseConfig, layer: int, numerics: Numerics) -> None:
        moe = config.moe[layer]
        self.input_layernorm = model_norm(config, numerics)
        self.self_attn = build_attention(config, layer, numerics)
        self.post_attention_layernorm = model_norm(config, numerics)
        self.mlp = (
            GatedMLP(config.hidden_size, config.intermediate_size, numerics=numerics)
            if moe is None
            else MoE(moe, config.hidden_size, layer, numerics)
        )

    def __call__(self, x: jax.Array, cache: LayerCache, rows: Rows) -> tuple[jax.Array, LayerCache]:
        """Map [M, D] to [M, D], having written these tokens to the cache."""
        mixed, cache = self.self_attn(self.input_layernorm(x), cache, rows)
        x = x + mixed
        normed = self.post_attention_layernorm(x)
        mlp = self.mlp
        out = mlp(normed, rows.counted) if isinstance(mlp, MoE) else mlp(normed)
        return x + out, cache
