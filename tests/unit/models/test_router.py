from dataclasses import replace
from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.models.configs.moe import RouterConfig, RouterKind, RouterOverride
from pals.models.numerics import Numerics
from pals.models.router import ROUTINGS, Router

SOFTMAX = RouterConfig(kind="softmax_topk", num_experts=6, num_experts_per_tok=2)
GROUPED = RouterConfig(
    kind="grouped_sigmoid",
    num_experts=6,
    num_experts_per_tok=2,
    num_groups=3,
    topk_groups=1,
    routed_scaling_factor=2.5,
    correction_bias=True,
)


def route(config, logits, correction=None):
    choice = None if correction is None else jnp.array(correction)
    routing = ROUTINGS[config.kind](jnp.array([logits]), choice, config)
    return routing.expert_ids[0].tolist(), np.asarray(routing.weights[0])


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


def test_every_kind_has_a_routing():
    assert set(ROUTINGS) == set(get_args(RouterKind))


def test_softmax_weights_sum_to_one_only_when_normalised():
    logits = [0.0, 2.0, 1.0, -1.0, 0.0, 0.0]
    shares = np.exp(logits) / np.exp(logits).sum()

    ids, plain = route(replace(SOFTMAX, norm_topk_prob=False), logits)
    _, normalised = route(SOFTMAX, logits)

    assert ids == [1, 2]
    np.testing.assert_allclose(plain, shares[[1, 2]], rtol=1e-6)
    np.testing.assert_allclose(normalised, shares[[1, 2]] / shares[[1, 2]].sum(), rtol=1e-6)


def test_softmax_over_the_chosen_equals_normalising_softmax_over_all():
    logits = [0.3, -2.0, 1.5, 0.1, 1.4, 0.0]

    chosen = route(replace(SOFTMAX, kind="topk_softmax"), logits)
    normalised = route(SOFTMAX, logits)

    assert chosen[0] == normalised[0]
    np.testing.assert_allclose(chosen[1], normalised[1], rtol=1e-5)


def test_the_correction_counts_for_the_choice_and_not_for_the_weights():
    logits = [0.0, 0.1, 3.0, -1.0, 0.0, 0.0]
    correction = [5.0, 0.0, 0.0, 0.0, 0.0, 0.0]

    ids, weights = route(GROUPED, logits, correction)

    assert ids == [0, 1]
    expected = sigmoid([0.0, 0.1])
    np.testing.assert_allclose(weights, 2.5 * expected / expected.sum(), rtol=1e-5)


def test_a_group_is_chosen_by_the_sum_of_its_two_best():
    logits = [3.0, -9.0, 1.0, 1.0, 0.0, 0.0]

    ids, _ = route(GROUPED, logits, [0.0] * 6)

    assert sorted(ids) == [2, 3]


def test_equal_scores_go_to_the_lower_expert():
    assert route(SOFTMAX, [1.0] * 6)[0] == [0, 1]


def test_uniform_weights_share_the_scale():
    config = replace(SOFTMAX, kind="uniform_topk", routed_scaling_factor=3.0)

    ids, weights = route(config, [0.0, 2.0, 1.0, 0.0, 0.0, 0.0])

    assert ids == [1, 2]
    assert weights.tolist() == [1.5, 1.5]


def test_the_router_adds_its_bias_to_the_logits():
    numerics = Numerics(compute=jnp.dtype(jnp.float32))
    router = Router(replace(SOFTMAX, bias=True), 4, numerics=numerics)
    router.bias[...] = jnp.array([0.0, 0.0, 0.0, 7.0, 8.0, 0.0])

    routing = router(jnp.zeros((1, 4)))

    assert routing.expert_ids.tolist() == [[4, 3]]


def test_logits_of_bf16_weights_are_float32():
    numerics = Numerics(compute=jnp.dtype(jnp.bfloat16))
    router = Router(replace(GROUPED), 4, numerics=numerics)

    routing = router(jnp.ones((3, 4), jnp.bfloat16))

    assert router.weight.dtype == jnp.bfloat16
    assert router.e_score_correction_bias.dtype == jnp.float32
    assert routing.weights.dtype == jnp.float32


@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=6, max_size=6),
    per_token=st.integers(1, 2),
    kind=st.sampled_from(get_args(RouterKind)),
)
def test_the_chosen_experts_differ_and_come_best_first(logits, per_token, kind):
    config = replace(GROUPED, kind=kind, num_experts_per_tok=per_token)

    ids, weights = route(config, logits, [0.0] * 6)

    assert len(set(ids)) == per_token
    assert np.isfinite(weights).all()
    assert list(weights) == sorted(weights, reverse=True)


def test_an_override_replaces_what_it_names():
    override = RouterOverride(kind="uniform_topk", num_experts_per_tok=1)

    assert override.apply(SOFTMAX) == replace(SOFTMAX, kind="uniform_topk", num_experts_per_tok=1)
    assert RouterOverride().apply(SOFTMAX) == SOFTMAX


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"kind": "oracle"}, "no router is called 'oracle'"),
        ({"num_experts_per_tok": 0}, "0 of 6 experts"),
        ({"num_experts_per_tok": 7}, "7 of 6 experts"),
        ({"num_groups": 4}, "do not form 4 groups"),
        ({"num_groups": 3, "topk_groups": 4}, "4 of 3 groups"),
        ({"num_groups": 3, "topk_groups": 1, "num_experts_per_tok": 3}, "3 of 2 experts"),
    ],
)
def test_routers_that_contradict_themselves_are_refused(changes, problem):
    with pytest.raises(ValueError, match=problem):
        replace(SOFTMAX, **changes)
