"""Attention over pages, against plain loops over contiguous keys and values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.models import walk
from pals.models.paged import Rows, StepShape, Tables
from pals.models.walk import View, attend

HEADS, KV_HEADS, HEAD_DIM, PAGE_TOKENS, SCALE = 4, 2, 8, 4, 0.3
MAX_PAGES = 16


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(walk, "DECODE_BLOCK_TOKENS", 2 * PAGE_TOKENS)
    monkeypatch.setattr(walk, "CHUNK_BLOCK_TOKENS", 3 * PAGE_TOKENS)


class Memory:
    """Keys and values of some sequences, both contiguous and scattered over pages."""

    def __init__(self, lengths, value_width=HEAD_DIM, seed=0):
        random = np.random.default_rng(seed)
        pages = 1 + len(lengths) * MAX_PAGES
        order = random.permutation(np.arange(1, pages)).reshape(len(lengths), MAX_PAGES)
        self.keys = draw(len(lengths), MAX_PAGES * PAGE_TOKENS, KV_HEADS, HEAD_DIM, seed=1)
        self.values = draw(len(lengths), MAX_PAGES * PAGE_TOKENS, KV_HEADS, value_width, seed=2)
        self.tables = order.astype(np.int32)
        self.cache = [
            np.full((KV_HEADS, pages, PAGE_TOKENS, array.shape[-1]), 1e9, np.float32)
            for array in (self.keys, self.values)
        ]
        for row, length in enumerate(lengths):
            for token in range(length):
                page, offset = divmod(token, PAGE_TOKENS)
                self.cache[0][:, order[row, page], offset] = self.keys[row, token]
                self.cache[1][:, order[row, page], offset] = self.values[row, token]

    def attend(self, shape, rows, queries, view):
        """Attend with rows (row of the memory, start, length)."""
        tables = Tables(
            jnp.array([start for _, start, _ in rows]),
            jnp.array([length for _, _, length in rows]),
            jnp.array(self.tables[[row for row, _, _ in rows]]),
        )
        step = Rows(tables=tables, counted=jnp.ones(shape.tokens, bool), rope=(), shape=shape)
        cache = tuple(map(jnp.array, self.cache))
        return np.asarray(jax.jit(lambda q, c: attend(q, c, step, view))(jnp.array(queries), cache))

    def reference(self, row, position, query, window=None, sinks=None):
        """Attend with one query [N, H] at ``position``, in plain loops."""
        first = 0 if window is None else max(0, position + 1 - window)
        mixed = np.zeros((HEADS, self.values.shape[-1]), np.float32)
        for head in range(HEADS):
            kv = head // (HEADS // KV_HEADS)
            weights = np.exp(self.keys[row, first : position + 1, kv] @ query[head] * SCALE)
            total = weights.sum() + (0 if sinks is None else np.exp(sinks[head]))
            mixed[head] = weights / total @ self.values[row, first : position + 1, kv]
        return mixed


def check(lengths, shape, rows, *, window=None, sinks=None, value_width=HEAD_DIM):
    memory = Memory(lengths, value_width)
    queries = draw(shape.tokens, HEADS, HEAD_DIM, seed=3)
    view = View(SCALE, window, None if sinks is None else jnp.array(sinks))

    found = memory.attend(shape, rows, queries, view)

    for number, (row, start, length) in enumerate(rows):
        first = min(number, shape.rows) * shape.row_tokens
        for token in range(length):
            expected = memory.reference(row, start + token, queries[first + token], window, sinks)
            np.testing.assert_allclose(found[first + token], expected, atol=2e-5)


def test_each_short_row_sees_its_own_tokens():
    check([40, 12, 1], StepShape(3), [(0, 39, 1), (1, 11, 1), (2, 0, 1)])


def test_chunk_sees_what_is_before_it_and_itself_causally():
    check([30], StepShape(0, 1, 16), [(0, 14, 16)])


def test_rows_and_chunk_of_one_step_do_not_meet():
    check([40, 12, 30], StepShape(2, 1, 16), [(0, 39, 1), (1, 11, 1), (2, 14, 16)])


def test_drafts_see_each_other_causally():
    check([30, 7], StepShape(2, 4), [(0, 26, 4), (1, 4, 3)])


@pytest.mark.parametrize(("window", "sinks"), [(3, None), (100, None), (9, [-1.0, 0.0, 2.0, 5.0])])
def test_switches_of_attention_follow_their_definitions(window, sinks):
    sinks = None if sinks is None else np.array(sinks, np.float32)
    shape, rows = StepShape(2, 2, 8), [(0, 38, 2), (1, 10, 2), (2, 20, 8)]
    check([40, 12, 28], shape, rows, window=window, sinks=sinks)


def test_values_may_be_narrower_than_keys():
    check([30], StepShape(1), [(0, 29, 1)], value_width=3)


def test_values_may_be_the_first_part_of_keys():
    memory = Memory([30])
    memory.cache.pop()
    memory.values = memory.keys[..., :5]
    query = draw(1, HEADS, HEAD_DIM, seed=3)

    found = memory.attend(StepShape(1), [(0, 29, 1)], query, View(SCALE, value_width=5))

    np.testing.assert_allclose(found[0], memory.reference(0, 29, query[0]), atol=2e-5)


def test_rows_that_only_pad_are_finite():
    """Whatever comes of them must not trap in the layers that follow."""
    memory = Memory([8, 0])

    found = memory.attend(
        StepShape(2), [(0, 7, 1), (1, 0, 0)], draw(2, HEADS, HEAD_DIM), View(SCALE)
    )

    assert np.isfinite(found[0]).all()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_rows_see_what_is_theirs(data):
    count = data.draw(st.sampled_from([2, 8, 20]))
    width = data.draw(st.sampled_from([1, 3]))
    window = data.draw(st.sampled_from([None, 1, 5, 11]))
    rows = []
    for row in range(count):
        length = data.draw(st.integers(1, width))
        rows.append((row, data.draw(st.integers(0, 50)), length))
    lengths = [start + length for _, start, length in rows]
    check(lengths, StepShape(count, width), rows, window=window)
