# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""The experts of one layer: each token runs through the few that its router chose.

Matrices are stacked in the checkpoints' ``(out, in)`` layout, one expert after another,
so that a file's bytes go to their place unturned.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from pals.models.grouped import (
    GatedActivation,
    Pairs,
    Strategy,
    expert_strategy,
    ragged_matmul_transposed,
    run_experts,
    sort_pairs,
)
from pals.models.matrix import make_weight, multiply, take_expert
from pals.models.numerics import Numerics
from pals.models.router import Routing
from pals.models.spread import add_up, check_divides, device_number


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Join as almost all families do (https://arxiv.org/abs/2002.05202)."""
    return jax.nn.silu(gate) * up


@dataclass(frozen=True, slots=True, kw_only=True)
class ClampedSwiGLU:
    """Joins as gpt_oss does (transformers: modeling_gpt_oss.py).

    Attributes:
        alpha: Steepness of the sigmoid.
        limit: Bounds the gate from above and the up projection on both sides.
    """

    alpha: float = 1.702
    limit: float = 7.0

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """Join [M, F] and [M, F]."""
        gate = jnp.minimum(gate, self.limit)
        up = jnp.clip(up, -self.limit, self.limit)
        return (up + 1) * gate * jax.nn.sigmoid(gate * self.alpha)


class ExpertLinear(nnx.Module):
    """One affine map for each expert, stacked as ``(E, out, in)``."""

    def __init__(
        self, num_experts: int, in_size: int, out_size: int, *, bias: bool, numerics: Numerics
    ) -> None:
        self.weight = make_weight((num_experts, out_size, in_size), numerics, "experts")
        zeros = jnp.zeros((num_experts, out_size), numerics.compute)
        self.bias = nnx.Param(zeros, split_axis=0) if bias else None

    def apply_one(self, x: jax.Array, expert: jax.Array) -> jax.Array:
        """Map rows [R, in] by the matrix of one expert; returns [R, out] in float32."""
        product = multiply(x, self.weight, expert)
        return product if self.bias is None else product + take_expert(self.bias[...], expert)

    def apply_groups(self, x: jax.Array, pairs: Pairs) -> jax.Array:
        """Map [P, in], sorted as ``pairs``, each row by its expert; returns float32."""
        assert isinstance(self.weight, nnx.Param)  # see `expert_strategy`
        product = ragged_matmul_transposed(x, self.weight[...], pairs.group_sizes)
        if self.bias is None:
            return product
        return product + self.bias[...].at[pairs.expert_ids].get(mode="clip")


class Experts(nnx.Module):
    """The feed-forward blocks among which a router chooses.

    Args:
        num_experts: E.
        hidden_size: D.
        intermediate_size: F, of each expert.
        activation: Joins gate and up.
        bias: Each projection is affine.
        numerics: Its platform decides how experts are computed; its devices divide them.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: GatedActivation = swiglu,
        bias: bool = False,
        numerics: Numerics,
    ) -> None:
        check_divides(num_experts, "experts", numerics.devices)
        matrices = partial(ExpertLinear, num_experts, bias=bias, numerics=numerics)
        self.gate_up_proj = matrices(hidden_size, 2 * intermediate_size)
        self.down_proj = matrices(intermediate_size, hidden_size)
        self.num_experts = num_experts
        self.activation = activation
        self.strategy: Strategy = expert_strategy(
            numerics.platform, is_plain=numerics.weights == "plain"
        )
        self.devices = numerics.devices

    def __call__(self, x: jax.Array, routing: Routing, rows: jax.Array | None = None) -> jax.Array:
        """Return each token's weighted sum over its experts.

        Args:
            x: [M, D].
            routing: The experts of each row.
            rows: [M] booleans, False for padding, whose result is 0 and costs nothing;
                None means that all rows count.

        Returns:
            [M, D] in float32.
        """
        with jax.named_scope("experts"):
            held = self.num_experts // self.devices
            if self.devices > 1:  # each takes its own experts of all tokens
                first = device_number(self.devices) * held
                routing = routing._replace(expert_ids=routing.expert_ids - first)
            part = run_experts(
                self.gate_up_proj,
                self.down_proj,
                x,
                sort_pairs(routing, held, rows),
                activation=self.activation,
                strategy=self.strategy,
            )
            return add_up(part, self.devices)
