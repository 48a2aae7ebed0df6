import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pals.models.attention import (
    Rows,
    attend,
    make_rows,
    read_slots,
    storage_dtype,
    update_cache,
)
from pals.models.configs import read_config

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
    return read_config(values | changes)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def rows(slots, starts, tokens=1):
    return make_rows(config(), jnp.array(slots), jnp.array(starts), tokens)


SCALE = 0.3


def attend_slots(queries, keys, values, rows, context=POSITIONS, **options):
    """Attend over the first ``context`` positions of each row's slot."""
    keys = read_slots(jnp.array(keys), rows.slots, context, jnp.float32)
    values = read_slots(jnp.array(values), rows.slots, context, jnp.float32)
    return attend(queries, keys, values, rows.starts, scale=SCALE, **options)


def reference_attention(queries, keys, values, position, window=None, sinks=None):
    """Attend with one query [N, H] at ``position`` over [K, C, H], in plain loops."""
    first = 0 if window is None else max(0, position + 1 - window)
    mixed = np.zeros((HEADS, values.shape[-1]), np.float32)
    for head in range(HEADS):
        kv = head // (HEADS // KV_HEADS)
        scores = keys[kv, first : position + 1] @ queries[head] * SCALE
        weights = np.exp(scores)
        total = weights.sum() + (0 if sinks is None else np.exp(sinks[head]))
        mixed[head] = weights / total @ values[kv, first : position + 1]
    return mixed


@pytest.mark.parametrize("context", [9, POSITIONS])
def test_prefill_attends_causally_within_its_slot(context):
    keys = draw(SLOTS, KV_HEADS, POSITIONS, HEAD_DIM)
    values = draw(SLOTS, KV_HEADS, POSITIONS, HEAD_DIM, seed=1)
    queries = draw(1, 4, HEADS, HEAD_DIM, seed=2)

    mixed = attend_slots(queries, keys, values, rows([2], [5], 4), context)

    for token in range(4):
        expected = reference_attention(queries[0, token], keys[2], values[2], 5 + token)
        np.testing.assert_allclose(mixed[0, token], expected, atol=1e-5)


def test_decode_rows_each_attend_to_their_own_slot_and_length():
    keys = draw(SLOTS, KV_HEADS, POSITIONS, HEAD_DIM)
    values = draw(SLOTS, KV_HEADS, POSITIONS, HEAD_DIM, seed=1)
    queries = draw(2, 1, HEADS, HEAD_DIM, seed=2)

    mixed = attend_slots(queries, keys, values, rows([2, 0], [0, 7]), POSITIONS)

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

    mixed = attend_slots(queries, keys, values, rows([0], [3]), POSITIONS)

    np.testing.assert_allclose(mixed[0, 0], expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_update_writes_each_row_to_its_place_and_nothing_else(dtype):
    stored = storage_dtype(jnp.dtype(dtype))
    zeros = jnp.zeros((SLOTS, KV_HEADS, POSITIONS, HEAD_DIM), stored)
    new = draw(2, 3, KV_HEADS, HEAD_DIM).astype(dtype)

    keys, values = update_cache((zeros, zeros), (new, -new), rows([2, 0], [4, 9], 3))

    expected = np.zeros(zeros.shape, dtype)
    expected[2, :, 4:7] = new[0].swapaxes(0, 1)
    expected[0, :, 9:12] = new[1].swapaxes(0, 1)
    np.testing.assert_array_equal(np.asarray(keys).view(dtype), expected)
    np.testing.assert_array_equal(np.asarray(values).view(dtype), -expected)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("window", 3),
        ("window", 100),
        ("sinks", np.array([-1.0, 0.0, 2.0, 5.0], np.float32)),
    ],
)
def test_switches_of_attention_follow_their_definitions(option, value):
    keys = draw(SLOTS, KV_HEADS, POSITIONS, HEAD_DIM)
    values = draw(SLOTS, KV_HEADS, POSITIONS, HEAD_DIM, seed=1)
    queries = draw(1, 4, HEADS, HEAD_DIM, seed=2)

    mixed = attend_slots(queries, keys, values, rows([2], [5], 4), **{option: value})

    for token in range(4):
        expected = reference_attention(
            queries[0, token], keys[2], values[2], 5 + token, **{option: value}
        )
        np.testing.assert_allclose(mixed[0, token], expected, atol=1e-5)


def test_values_may_be_narrower_than_keys():
    keys = draw(SLOTS, KV_HEADS, POSITIONS, HEAD_DIM)
    values = draw(SLOTS, KV_HEADS, POSITIONS, 3, seed=1)
    queries = draw(1, 1, HEADS, HEAD_DIM, seed=2)

    mixed = attend_slots(queries, keys, values, rows([0], [3]))

    expected = reference_attention(queries[0, 0], keys[0], values[0], 3)
    np.testing.assert_allclose(mixed[0, 0], expected, atol=1e-5)


def test_rows_count_positions_from_their_start():
    made = rows([0, 1], [0, 3], 2)

    assert isinstance(made, Rows)
    (table,) = made.rope
    np.testing.assert_allclose(table.cos[1, 0], rows([0], [3]).rope[0].cos[0, 0])
    np.testing.assert_allclose(table.sin[0, 1], rows([0], [1]).rope[0].sin[0, 0])
