import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.errors import CannotDivide
from pals.models import in_place
from pals.models.experts import ClampedSwiGLU, Experts
from pals.models.grouped import block_size, cut_blocks, sort_pairs
from pals.models.numerics import Numerics
from pals.models.router import Routing
from tests.unit.models.moe_reference import (
    F32,
    ExpertWeights,
    build_experts,
    random_routing,
    run,
)

PLATFORMS = ["cpu", "gpu", "tpu"]
D, F = 16, 12


def random_rows(count, *, seed=1):
    return np.random.default_rng(seed).standard_normal((count, D)).astype(np.float32)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    ("num_experts", "per_token", "num_tokens"),
    [(1, 1, 1), (9, 8, 1), (5, 5, 2), (9, 2, 7), (3, 2, 16), (32, 1, 5)],
)
@settings(max_examples=20)
@given(seed=st.integers(0, 1000), data=st.data())
def test_experts_equal_a_token_by_token_reference(
    platform, num_experts, per_token, num_tokens, seed, data
):
    weights = ExpertWeights.random(num_experts, D, F)
    x = random_rows(num_tokens)
    routing = random_routing(num_tokens, num_experts, per_token, seed=seed)
    counted = np.array(data.draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens)))

    found = run(build_experts(weights, platform=platform), x, routing, jnp.asarray(counted))

    expected = weights.sum_experts(x, *map(np.asarray, routing)) * counted[:, None]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("num_tokens", [1, 33])
def test_all_tokens_may_go_to_one_expert(platform, num_tokens):
    weights = ExpertWeights.random(6, D, F)
    x = random_rows(num_tokens)
    ids = np.full((num_tokens, 1), 4, np.int32)
    shares = np.ones((num_tokens, 1), np.float32)

    routing = Routing(jnp.asarray(ids), jnp.asarray(shares))
    found = run(build_experts(weights, platform=platform), x, routing)

    np.testing.assert_allclose(found, weights.sum_experts(x, ids, shares), atol=1e-5)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_token_gets_what_it_would_get_alone(platform):
    experts = build_experts(ExpertWeights.random(8, D, F), platform=platform)
    x = random_rows(40)
    routing = random_routing(40, 8, 3)

    together = run(experts, x, routing)
    alone = [
        run(experts, x[i : i + 1], Routing(*(part[i : i + 1] for part in routing)))
        for i in range(40)
    ]

    np.testing.assert_allclose(together, np.concatenate(alone), atol=2e-6)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_bf16_experts_stay_within_rounding_of_float32(platform):
    weights = ExpertWeights.random(8, D, F)
    x = random_rows(20)
    routing = random_routing(20, 8, 2)
    bf16 = jnp.dtype(jnp.bfloat16)

    experts = build_experts(weights, platform=platform, dtype=bf16)
    found = run(experts, jnp.asarray(x, bf16), routing)

    expected = weights.sum_experts(x, *map(np.asarray, routing))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("num_tokens", [1, 2, 9])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_experts_that_are_read_in_place_stay_within_rounding_of_float32(
    monkeypatch, platform, num_tokens
):
    monkeypatch.setattr(in_place, "bf16_products", lambda: "none")
    hidden_size, intermediate_size = 256, 128  # which divide into parts
    weights = ExpertWeights.random(8, hidden_size, intermediate_size)
    x = np.random.default_rng(1).standard_normal((num_tokens, hidden_size))
    routing = random_routing(num_tokens, 8, 2)
    bf16 = jnp.dtype(jnp.bfloat16)

    experts = build_experts(weights, platform=platform, dtype=bf16)
    found = jax.jit(lambda x: experts(x, routing))(jnp.asarray(x, bf16))

    expected = weights.sum_experts(x, *map(np.asarray, routing))
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("platform", PLATFORMS)
def test_infinities_of_padding_touch_no_other_token(platform):
    weights = ExpertWeights.random(4, D, F)
    x = random_rows(6)
    x[2] = np.inf
    counted = np.arange(6) != 2
    routing = random_routing(6, 4, 2)

    found = run(build_experts(weights, platform=platform), x, routing, jnp.asarray(counted))

    expected = weights.sum_experts(np.where(counted[:, None], x, 0), *map(np.asarray, routing))
    np.testing.assert_allclose(found, expected * counted[:, None], atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_memory_on_a_cpu_does_not_grow_with_the_experts(dtype):
    def workspace(num_experts):
        experts = Experts(
            num_experts, 256, 128, numerics=Numerics(compute=jnp.dtype(dtype), platform="cpu")
        )
        x = jnp.zeros((64, 256), dtype)
        lowered = run.lower(experts, x, random_routing(64, num_experts, 4))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    one_expert = 3 * 256 * 128 * jnp.dtype(dtype).itemsize
    assert workspace(128) - workspace(32) < one_expert


def test_clamped_swiglu_bounds_both_sides():
    gate = jnp.array([[-100.0, 2.0, 100.0]])
    up = jnp.array([[-100.0, 0.5, 100.0]])

    found = ClampedSwiGLU(alpha=1.702, limit=7.0)(gate, up)

    expected = [
        -6 * -100 / (1 + np.exp(170.2)),
        1.5 * 2 / (1 + np.exp(-1.702 * 2)),
        8 * 7 / (1 + np.exp(-1.702 * 7)),
    ]
    np.testing.assert_allclose(found, [expected], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [2, 7])
@given(sizes=st.lists(st.integers(0, 20), min_size=5, max_size=5))
def test_blocks_cover_every_pair_once_and_no_block_mixes_experts(size, sizes):
    found = jax.jit(cut_blocks, static_argnums=(1, 2))(np.array(sizes, np.int32), 103, size)

    blocks = [np.asarray(part) for part in found]
    total = int(blocks[3])
    covered = [
        (start + i, expert)
        for expert, start, count in zip(*(part[:total] for part in blocks[:3]), strict=True)
        for i in range(count)
    ]
    assert total <= len(blocks[0])
    assert covered == list(enumerate(np.repeat(np.arange(5), sizes)))
    assert all(1 <= count <= size for count in blocks[2][:total])


@pytest.mark.parametrize(("num_pairs", "num_experts"), [(1, 128), (8, 128), (512, 8), (1, 1)])
def test_a_block_has_two_rows_or_more(num_pairs, num_experts):
    assert 2 <= block_size(num_pairs, num_experts) <= max(2, num_pairs)


def test_pairs_of_experts_held_elsewhere_come_last():
    routing = Routing(jnp.array([[5, 1], [-2, 0]]), jnp.array([[0.1, 0.2], [0.3, 0.4]]))

    pairs = sort_pairs(routing, 2, None)

    assert pairs.expert_ids.tolist() == [0, 1, 2, 2]
    assert pairs.tokens.tolist()[:2] == [1, 0]
    assert pairs.group_sizes.tolist() == [1, 1]
    np.testing.assert_allclose(pairs.weights[pairs.positions], routing.weights)


def test_experts_that_do_not_divide_among_devices_are_refused():
    mesh = jax.sharding.AbstractMesh((2,), ("model",))
    numerics = Numerics(compute=F32, mesh=mesh)

    with pytest.raises(CannotDivide) as caught:
        Experts(5, D, F, numerics=numerics)

    assert caught.value.fields["count"] == 5
    assert str(caught.value) == "5 experts cannot be divided among 2 devices"
