# pyright: reportUnknownMemberType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""Which experts a token goes to, and with which weight each counts.

A family describes its router by a `RouterConfig`; the kinds are functions from logits to
a `Routing`, looked up by name. An experiment replaces a kind, or the number of experts,
by a `RouterOverride`; the weights of the checkpoint stay as they are.

Logits and all that follows are float32. Equal scores go to the lower expert first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from pals.models.layers import matmul_transposed

MIN_WEIGHT_SUM = 1e-20
"""Keeps the normalised weights of a token finite when all its scores vanish."""


class Routing(NamedTuple):
    """The choice for M tokens, each token's best expert first.

    Attributes:
        expert_ids: [M, A] int32, all different in a row.
        weights: [M, A] float32.
    """

    expert_ids: jax.Array
    weights: jax.Array


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """How the tokens of one layer are routed.

    Attributes:
        kind: A name in `ROUTINGS`.
        norm_topk_prob: Each token's weights are scaled to a sum of 1.
        num_groups: Groups of neighbouring experts, all of one size.
        topk_groups: Groups in which a token may choose.
        routed_scaling_factor: Multiplies the weights at the end.
        bias: The logits are affine.
        correction_bias: The checkpoint holds a bias that counts for the choice only.
    """

    kind: str
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool = True
    num_groups: int = 1
    topk_groups: int = 1
    routed_scaling_factor: float = 1.0
    bias: bool = False
    correction_bias: bool = False

    def __post_init__(self) -> None:
        """Refuse what no routing could fulfil.

        Raises:
            ValueError: An unknown kind, or numbers that contradict each other.
        """
        if self.kind not in ROUTINGS:
            raise ValueError(f"no router is called {self.kind!r}; there are {sorted(ROUTINGS)}")
        group_size, rest = divmod(self.num_experts, self.num_groups)
        if rest:
            raise ValueError(f"{self.num_experts} experts do not form {self.num_groups} groups")
        if not 1 <= self.topk_groups <= self.num_groups:
            raise ValueError(f"{self.topk_groups} of {self.num_groups} groups cannot be chosen")
        candidates = group_size * self.topk_groups
        if not 1 <= self.num_experts_per_tok <= candidates:
            raise ValueError(f"{self.num_experts_per_tok} of {candidates} experts cannot be chosen")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterOverride:
    """What an experiment changes in every router of a model; None leaves it."""

    kind: str | None = None
    num_experts_per_tok: int | None = None

    def apply(self, config: RouterConfig) -> RouterConfig:
        """Return the changed config.

        Raises:
            ValueError: The result makes no sense for this model.
        """
        return replace(
            config,
            kind=self.kind or config.kind,
            num_experts_per_tok=self.num_experts_per_tok or config.num_experts_per_tok,
        )


RoutingFunction = Callable[[jax.Array, jax.Array | None, RouterConfig], Routing]
"""Maps float32 logits [M, E] and the correction bias [E], where there is one, to a choice."""


def route_softmax_topk(
    logits: jax.Array, correction: jax.Array | None, config: RouterConfig
) -> Routing:
    """Choose by the probabilities over all experts (transformers: qwen3_moe, mixtral)."""
    del correction
    probabilities = jax.nn.softmax(logits, axis=-1)
    weights, expert_ids = lax.top_k(probabilities, config.num_experts_per_tok)
    return Routing(expert_ids, scaled(weights, config))


def route_topk_softmax(
    logits: jax.Array, correction: jax.Array | None, config: RouterConfig
) -> Routing:
    """Choose by the logits and share out among the chosen (transformers: gpt_oss)."""
    del correction
    chosen, expert_ids = lax.top_k(logits, config.num_experts_per_tok)
    return Routing(expert_ids, jax.nn.softmax(chosen, axis=-1))


def route_grouped_sigmoid(
    logits: jax.Array, correction: jax.Array | None, config: RouterConfig
) -> Routing:
    """Choose among the best groups by corrected scores, weigh by the plain ones.

    A group's score is the sum of its two best experts (https://arxiv.org/abs/2412.19437;
    transformers: deepseek_v3 and glm4_moe, which agree).
    """
    scores = jax.nn.sigmoid(logits)
    corrected = scores if correction is None else scores + correction
    candidates = jnp.where(in_best_groups(corrected, config), corrected, -jnp.inf)
    _, expert_ids = lax.top_k(candidates, config.num_experts_per_tok)
    return Routing(expert_ids, scaled(jnp.take_along_axis(scores, expert_ids, axis=-1), config))


def route_uniform_topk(
    logits: jax.Array, correction: jax.Array | None, config: RouterConfig
) -> Routing:
    """Choose by the corrected logits and weigh all alike: what do the weights add?

    No family is trained so; it is the null hypothesis of experiments/expert_routing.
    """
    scores = logits if correction is None else jax.nn.sigmoid(logits) + correction
    _, expert_ids = lax.top_k(scores, config.num_experts_per_tok)
    weight = config.routed_scaling_factor / config.num_experts_per_tok
    return Routing(expert_ids, jnp.full(expert_ids.shape, weight, jnp.float32))


ROUTINGS: dict[str, RoutingFunction] = {
    "softmax_topk": route_softmax_topk,
    "topk_softmax": route_topk_softmax,
    "grouped_sigmoid": route_grouped_sigmoid,
    "uniform_topk": route_uniform_topk,
}


def scaled(weights: jax.Array, config: RouterConfig) -> jax.Array:
    """Normalise and scale the weights [M, A] of the chosen experts."""
    if config.norm_topk_prob:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + MIN_WEIGHT_SUM)
    return weights * config.routed_scaling_factor


def in_best_groups(scores: jax.Array, config: RouterConfig) -> jax.Array:
    """Return which of the scores [M, E] lie in a token's best groups, as booleans [M, E]."""
    grouped = scores.reshape(scores.shape[0], config.num_groups, -1)
    best_two, _ = lax.top_k(grouped, min(2, grouped.shape[-1]))
    _, groups = lax.top_k(jnp.sum(best_two, axis=-1), config.topk_groups)
    chosen = jnp.any(jax.nn.one_hot(groups, config.num_groups, dtype=jnp.bool), axis=1)
    return jnp.repeat(chosen, grouped.shape[-1], axis=-1)


class Router(nnx.Module):
    """Scores tokens against every expert and chooses.

    Weights have the compute dtype of the model, and are never quantised; products are
    summed in float32. The correction bias is float32, as DeepSeek V3 keeps it.
    """

    def __init__(self, config: RouterConfig, hidden_size: int, *, dtype: jnp.dtype) -> None:
        num_experts = config.num_experts
        self.config = config
        self.weight = nnx.Param(jnp.zeros((num_experts, hidden_size), dtype))
        self.bias = nnx.Param(jnp.zeros((num_experts,), dtype)) if config.bias else None
        self.e_score_correction_bias = (
            nnx.Param(jnp.zeros((num_experts,), jnp.float32)) if config.correction_bias else None
        )

    def __call__(self, x: jax.Array) -> Routing:
        """Route the rows of [M, D]."""
        with jax.named_scope("router"):
            logits = matmul_transposed(x, self.weight[...])
            if self.bias is not None:
                logits = logits + self.bias[...]
            correction = self.e_score_correction_bias
            return ROUTINGS[self.config.kind](
                logits, None if correction is None else correction[...], self.config
            )
