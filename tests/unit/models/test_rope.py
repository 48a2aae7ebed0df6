import math

import jax.numpy as jnp
import numpy as np
import pytest

from pals.models.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    RopeConfig,
    YarnScaling,
)
from pals.models.rope import inverse_frequencies, make_table, pair_halves, rotate

HEADS, HEAD_DIM = 4, 8
PLAIN = RopeConfig(theta=10000.0, width=HEAD_DIM)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def table(position, rope=PLAIN):
    return make_table(rope, jnp.array([[position]]))


def test_rotation_turns_each_pair_by_its_angle():
    x = draw(1, 1, HEADS, HEAD_DIM)

    turned = np.asarray(rotate(x, table(7)))

    angles = 7 * 10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    first, second = x[..., : HEAD_DIM // 2], x[..., HEAD_DIM // 2 :]
    expected = np.concatenate(
        [
            first * np.cos(angles) - second * np.sin(angles),
            second * np.cos(angles) + first * np.sin(angles),
        ],
        axis=-1,
    )
    np.testing.assert_allclose(turned, expected, atol=1e-5)


def test_what_is_past_the_width_stays():
    x = draw(1, 1, HEADS, HEAD_DIM + 4)

    turned = np.asarray(rotate(x, table(7)))

    np.testing.assert_array_equal(turned[..., HEAD_DIM:], x[..., HEAD_DIM:])
    np.testing.assert_allclose(
        turned[..., :HEAD_DIM], rotate(x[..., :HEAD_DIM], table(7)), atol=1e-6
    )


def test_rotated_products_depend_on_the_distance_only():
    x, y = draw(1, 1, 1, HEAD_DIM), draw(1, 1, 1, HEAD_DIM, seed=1)

    def product(i, j):
        return float(jnp.sum(rotate(x, table(i)) * rotate(y, table(j))))

    assert product(3, 10) == pytest.approx(product(103, 110), abs=1e-4)


def test_positions_above_256_differ_in_bf16_models():
    made = make_table(PLAIN, jnp.array([[256, 257]]))

    assert made.cos.dtype == jnp.float32
    assert not np.array_equal(made.cos[0, 0], made.cos[0, 1])


def test_llama3_scaling_keeps_fast_slows_slow_and_joins_between():
    scaling = Llama3Scaling(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    plain = inverse_frequencies(RopeConfig(theta=5e5, width=128))

    scaled = inverse_frequencies(RopeConfig(theta=5e5, width=128, scaling=scaling))

    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_allclose(scaled[turns > 4], plain[turns > 4], rtol=1e-6)
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert np.all((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8))
    assert scaled.dtype == np.float32


def test_linear_scaling_slows_all_and_dynamic_none_within_the_context():
    plain = inverse_frequencies(PLAIN)

    def scaled(scaling):
        return inverse_frequencies(RopeConfig(theta=10000.0, width=HEAD_DIM, scaling=scaling))

    np.testing.assert_allclose(scaled(LinearScaling(factor=4.0)), plain / 4, rtol=1e-6)
    np.testing.assert_array_equal(scaled(DynamicScaling(factor=4.0)), plain)


def test_yarn_keeps_what_turns_often_and_slows_what_seldom_does():
    scaling = YarnScaling(
        factor=4.0,
        attention_factor=1.5,
        beta_fast=32.0,
        beta_slow=1.0,
        original_max_position_embeddings=4096,
        truncate=True,
    )
    rope = RopeConfig(theta=10000.0, width=128, scaling=scaling)
    plain = inverse_frequencies(RopeConfig(theta=10000.0, width=128))

    scaled = inverse_frequencies(rope)

    turns = 4096 * plain / (2 * np.pi)
    np.testing.assert_allclose(scaled[turns > 40], plain[turns > 40], rtol=1e-6)
    np.testing.assert_allclose(scaled[turns < 0.8], plain[turns < 0.8] / 4, rtol=1e-6)
    assert math.isclose(float(make_table(rope, jnp.array([[0]])).cos[0, 0, 0]), 1.5)


def test_neighbours_are_paired_half_a_head_apart():
    found = pair_halves(jnp.array([[0, 10, 1, 11, 2, 12]]))

    assert found.tolist() == [[0, 1, 2, 10, 11, 12]]
