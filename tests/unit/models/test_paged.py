import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pals.models.configs import read_config
from pals.models.paged import StepShape, Tables, make_rows, storage_dtype, update_cache

PAGES, KV_HEADS, PAGE_TOKENS, HEAD_DIM = 9, 2, 4, 8
CONFIG = read_config(
    {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": 8,
    }
)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def tables(*rows):
    """Return the tables of rows (start, length, pages)."""
    width = max(len(pages) for _, _, pages in rows)
    return Tables(
        jnp.array([start for start, _, _ in rows]),
        jnp.array([length for _, length, _ in rows]),
        jnp.array([[*pages, *[0] * (width - len(pages))] for _, _, pages in rows]),
    )


def written(shape, rows, news, platform="cpu"):
    stored = storage_dtype(news.dtype, platform)
    zeros = jnp.zeros((KV_HEADS, PAGES, PAGE_TOKENS, HEAD_DIM), stored)
    made = make_rows(CONFIG, shape, tables(*rows))
    keys, values = jax.jit(update_cache, static_argnums=3)(
        (zeros, zeros), (news, -news), made, platform
    )
    found = np.asarray(keys).view(news.dtype)
    np.testing.assert_array_equal(np.asarray(values).view(news.dtype)[:, 1:], -found[:, 1:])
    return found


def expected_of(rows, parts, dtype=np.float32):
    pages = np.zeros((KV_HEADS, PAGES, PAGE_TOKENS, HEAD_DIM), dtype)
    for (start, length, table), part in zip(rows, parts, strict=True):
        for token in range(length):
            page, offset = divmod(start + token, PAGE_TOKENS)
            pages[:, table[page], offset] = part[token]
    return pages


@pytest.mark.parametrize(
    ("dtype", "platform"),
    [
        (np.float32, "cpu"),
        (np.float32, "tpu"),
        (ml_dtypes.bfloat16, "cpu"),
        (ml_dtypes.bfloat16, "gpu"),
        (ml_dtypes.bfloat16, "tpu"),
    ],
)
def test_tokens_of_short_rows_go_to_their_pages_and_padding_to_nobodys(dtype, platform):
    shape = StepShape(3, 2)
    rows = [(3, 2, [5, 2]), (6, 1, [1, 8]), (0, 0, [7])]
    news = draw(shape.tokens, KV_HEADS, HEAD_DIM).astype(dtype)

    found = written(shape, rows, news, platform)

    expected = expected_of(rows, [news[0:2], news[2:4], news[4:6]], dtype)
    np.testing.assert_array_equal(found[:, 1:], expected[:, 1:])


@pytest.mark.parametrize("start", [0, 1, 3, 4, 7])
@pytest.mark.parametrize("length", [1, 4, 6, 9])
def test_chunk_goes_to_its_pages_wherever_it_begins(start, length):
    shape = StepShape(0, 1, 9)
    rows = [(start, length, [3, 6, 1, 8])]
    news = draw(shape.tokens, KV_HEADS, HEAD_DIM)

    found = written(shape, rows, news)

    np.testing.assert_array_equal(found[:, 1:], expected_of(rows, [news])[:, 1:])


def test_chunk_keeps_what_stands_in_its_first_and_last_page():
    shape = StepShape(0, 1, 4)
    old = jnp.array(draw(KV_HEADS, PAGES, PAGE_TOKENS, HEAD_DIM, seed=1))
    news = draw(4, KV_HEADS, HEAD_DIM)
    rows = [(2, 4, [3, 6])]

    made = make_rows(CONFIG, shape, tables(*rows))
    (found,) = update_cache((old,), (jnp.array(news),), made, "cpu")

    expected = np.array(old)
    expected[:, 3, 2:], expected[:, 6, :2] = news[:2].swapaxes(0, 1), news[2:].swapaxes(0, 1)
    np.testing.assert_array_equal(found[:, 1:], expected[:, 1:])


def test_tokens_stand_in_short_rows_and_then_in_the_chunk():
    made = make_rows(CONFIG, StepShape(2, 2, 3), tables((5, 2, [1]), (9, 1, [1]), (0, 2, [1])))

    assert made.counted.tolist() == [True, True, True, False, True, True, False]
    (table,) = made.rope
    positions = jnp.array([5, 6, 9, 10, 0, 1, 2])
    np.testing.assert_allclose(table.cos[:, 0], jnp.cos(positions), atol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_token_keeps_what_stands_in_its_page(platform):
    shape = StepShape(2)
    old = jnp.array(draw(KV_HEADS, PAGES, PAGE_TOKENS, HEAD_DIM, seed=1))
    news = draw(2, KV_HEADS, HEAD_DIM)
    made = make_rows(CONFIG, shape, tables((2, 1, [3]), (4, 1, [5, 6])))

    (found,) = update_cache((old,), (jnp.array(news),), made, platform)

    expected = np.array(old)
    expected[:, 3, 2], expected[:, 6, 0] = news
    np.testing.assert_array_equal(found[:, 1:], expected[:, 1:])


def test_what_is_not_finite_is_not_left_to_the_next_session():
    news = draw(1, KV_HEADS, HEAD_DIM)
    news[0, 1, 2:5] = [np.nan, np.inf, -np.inf]

    found = written(StepShape(1), [(0, 1, [3])], news)

    assert found[1, 3, 0, 2:5].tolist() == [0, 0, 0]
