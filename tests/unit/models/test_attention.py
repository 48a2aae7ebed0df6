import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pals.models.attention import (
    LayerCache,
    Rows,
    attend,
    inverse_frequencies,
    make_rows,
    rotate,
    storage_dtype,
    update_cache,
)
from pals.models.config import Llama3Scaling, ModelConfig, RopeConfig

SLOTS, KV_HEADS, POSITIONS, HEAD_DIM = 3, 2, 12, 8
HEADS = 4


def config(**changes):
    values = {
        "model_type": "llama",
        "hidden_size": HEADS * HEAD_DIM,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": 8,
    }
    return ModelConfig.from_hf(values | changes)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def rows(slots, starts, tokens=1):
    return make_rows(config(), jnp.array(slots), jnp.array(starts), tokens)


def reference_attention(queries, keys, values, position):
    """Attend with one query [N, H] at ``position`` over [K, C, H], in plain loops."""
    mixed = np.zeros_like(queries)
    for head in range(HEADS):
        kv = head // (HEADS // KV_HEADS)
        scores = keys[kv, : position + 1] @ queries[head] / np.sqrt(HEAD_DIM)
        weights = np.exp(scores - scores.max())
        mixed[head] = weights / weights.sum() @ values[kv, : position + 1]
    return mixed


@pytest.mark.parametrize("context", [9, POSITIONS])
def test_prefill_attends_causally_within_its_slot(context):
    keys = draw(SLOTS, KV_HEADS, POSITIONS, HEAD_DIM)
    values = draw(SLOTS, KV_HEADS, POSITIONS, HEAD_DIM, seed=1)
    queries = draw(1, 4, HEADS, HEAD_DIM, seed=2)

    mixed = attend(queries, LayerCache(keys, values), rows([2], [5], 4), context=context)

    for token in range(4):
        expected = reference_attention(queries[0, token], keys[2], values[2], 5 + token)
        np.testing.assert_allclose(mixed[0, token], expected, atol=1e-5)


def test_decode_rows_each_attend_to_their_own_slot_and_length():
    keys = draw(SLOTS, KV_HEADS, POSITIONS, HEAD_DIM)
    values = draw(SLOTS, KV_HEADS, POSITIONS, HEAD_DIM, seed=1)
    queries = draw(2, 1, HEADS, HEAD_DIM, seed=2)

    mixed = attend(queries, LayerCache(keys, values), rows([2, 0], [0, 7]), context=POSITIONS)

    for row, (slot, position) in enumerate([(2, 0), (0, 7)]):
        expected = reference_attention(queries[row, 0], keys[slot], values[slot], position)
        np.testing.assert_allclose(mixed[row, 0], expected, atol=1e-5)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_a_former_session_left_behind_is_not_seen(poison):
    keys = draw(SLOTS, KV_HEADS, POSITIONS, HEAD_DIM)
    values = draw(SLOTS, KV_HEADS, POSITIONS, HEAD_DIM, seed=1)
    queries = draw(1, 1, HEADS, HEAD_DIM, seed=2)
    expected = reference_attention(queries[0, 0], keys[0], values[0], 3)
    keys[:, :, 4:] = poison
    values[:, :, 4:] = poison

    mixed = attend(queries, LayerCache(keys, values), rows([0], [3]), context=POSITIONS)

    np.testing.assert_allclose(mixed[0, 0], expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_update_writes_each_row_to_its_place_and_nothing_else(dtype):
    stored = storage_dtype(jnp.dtype(dtype))
    zeros = jnp.zeros((SLOTS, KV_HEADS, POSITIONS, HEAD_DIM), stored)
    new = draw(2, 3, KV_HEADS, HEAD_DIM).astype(dtype)

    cache = update_cache(LayerCache(zeros, zeros), new, -new, rows([2, 0], [4, 9], 3))

    expected = np.zeros(zeros.shape, dtype)
    expected[2, :, 4:7] = new[0].swapaxes(0, 1)
    expected[0, :, 9:12] = new[1].swapaxes(0, 1)
    np.testing.assert_array_equal(np.asarray(cache.keys).view(dtype), expected)
    np.testing.assert_array_equal(np.asarray(cache.values).view(dtype), -expected)


def test_rotation_turns_each_pair_by_its_angle():
    x = draw(1, 1, HEADS, HEAD_DIM)

    turned = np.asarray(rotate(x, rows([0], [7])))

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


def test_rotated_products_depend_on_the_distance_only():
    x, y = draw(1, 1, 1, HEAD_DIM), draw(1, 1, 1, HEAD_DIM, seed=1)

    def product(i, j):
        return float(jnp.sum(rotate(x, rows([0], [i])) * rotate(y, rows([0], [j]))))

    assert product(3, 10) == pytest.approx(product(103, 110), abs=1e-4)


def test_positions_above_256_differ_in_bf16_models():
    made = rows([0], [256], 2)

    assert made.cos.dtype == jnp.float32
    assert not np.array_equal(made.cos[0, 0], made.cos[0, 1])


def test_llama3_scaling_keeps_fast_slows_slow_and_joins_between():
    scaling = Llama3Scaling(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    plain = inverse_frequencies(RopeConfig(theta=5e5), 128)

    scaled = inverse_frequencies(RopeConfig(theta=5e5, scaling=scaling), 128)

    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_allclose(scaled[turns > 4], plain[turns > 4], rtol=1e-6)
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert np.all((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8))
    assert scaled.dtype == np.float32


def test_rows_count_positions_from_their_start():
    made = rows([0, 1], [0, 3], 2)

    assert isinstance(made, Rows)
    np.testing.assert_allclose(made.cos[1, 0], rows([0], [3]).cos[0, 0])
    np.testing.assert_allclose(made.sin[0, 1], rows([0], [1]).sin[0, 0])
