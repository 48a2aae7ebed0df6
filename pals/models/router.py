# pyright: reportUnknownMemberType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""Which experts a token goes to, and with which weight each counts.

A family describes its router by a `RouterConfig`; its kinds are functions from logits to
a `Routing`, looked up by name. An experiment replaces the kind, or the number of experts,
by a `RouterOverride`; the weights of the checkpoint stay as they are.

Logits and all that follows are float32. Equal scores go to the lower expert first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from pals.models.configs.moe import RouterConfig, RouterKind
from pals.models.matmul import matmul_transposed
from pals.models.numerics import Numerics

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


ROUTINGS: dict[RouterKind, RoutingFunction] = {
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

    def __init__(self, config: RouterConfig, hidden_size: int, *, numerics: Numerics) -> None:
        num_experts, dtype = config.num_experts, numerics.compute
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
