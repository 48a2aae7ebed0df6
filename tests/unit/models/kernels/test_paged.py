"""Kernels, interpreted, against attention in plain XLA, which has tests of its own."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.models.kernels import mosaic, paged
from pals.models.kernels.paged import attend_paged
from pals.models.paged import Rows, StepShape, Tables
from pals.models.walk import View, attend

KV_HEADS, GROUPS, HEAD_DIM, PAGE_TOKENS, MAX_PAGES = 2, 3, 16, 4, 16
ROW_TOKENS = MAX_PAGES * PAGE_TOKENS
KERNELS = ("triton", "mosaic")
SCALE = 0.3
SINKS = jnp.array([-1.0, 0.0, 2.0, 5.0, 0.5, -3.0])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks and tiles, the last of them partial, within few tokens."""
    monkeypatch.setattr(mosaic, "BLOCK_TOKENS", 2 * PAGE_TOKENS)
    for kernel in KERNELS:
        monkeypatch.setitem(paged.MAX_TILE, kernel, 16)


@cache
def memory(batch):
    """Return queries, cache and tables of random numbers, whose pages are anywhere."""
    random = np.random.default_rng(batch)
    num_pages = 1 + batch * MAX_PAGES
    pages = 1 + random.permutation(num_pages - 1).reshape(batch, MAX_PAGES)
    shape = (KV_HEADS, num_pages, PAGE_TOKENS, HEAD_DIM)
    arrays = tuple(random.standard_normal(shape, dtype=np.float32) for _ in range(2))
    return arrays, pages.astype(np.int32)


@cache
def compiled(kernel, shape, window, sinks):
    """Return what attends by a kernel and by plain XLA; one program for any rows."""
    view = View(SCALE, window, SINKS if sinks else None)

    def both(queries, arrays, tables):
        rows = Rows(tables=tables, counted=jnp.ones(shape.tokens, bool), rope=(), shape=shape)
        found = attend_paged(queries, arrays, rows, view, kernel, interpret=True)
        return found, attend(queries, arrays, rows, view)

    return jax.jit(both)


def check(kernel, shape, rows, *, window, sinks):
    """Compare what the tokens of rows (start, length) get."""
    arrays, pages = memory(shape.batch)
    starts, lengths = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    random = np.random.default_rng(1)
    queries = random.standard_normal((shape.tokens, KV_HEADS * GROUPS, HEAD_DIM), dtype=np.float32)
    run = compiled(kernel, shape, window, sinks)

    found, expected = run(queries, arrays, Tables(starts, lengths, pages))

    for number, length in enumerate(lengths):
        first = min(number, shape.rows) * shape.row_tokens
        own = slice(first, first + length)
        np.testing.assert_allclose(found[own], expected[own], atol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("window", "sinks"), [(None, False), (7, True)])
@settings(max_examples=15)
@given(data=st.data())
def test_rows_and_a_chunk_get_what_plain_attention_gives(kernel, window, sinks, data):
    most = (2, 2, 2, 16)
    starts = [data.draw(st.integers(0, ROW_TOKENS - tokens)) for tokens in most]
    rows = [
        (start, data.draw(st.integers(0, tokens)))
        for start, tokens in zip(starts, most, strict=True)
    ]
    check(kernel, StepShape(3, 2, 16), rows, window=window, sinks=sinks)
