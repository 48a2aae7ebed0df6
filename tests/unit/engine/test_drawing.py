from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.random import threefry_2x32

from pals.engine.drawing import (
    HEAD_TOKENS,
    Draws,
    draw_noise,
    draw_tokens,
    find_head,
    find_least_kept,
    pick_likeliest,
    threefry,
    to_gumbel,
    top_tokens,
)
from pals.types import Sampling
from tests.unit.engine import sampling_reference as reference

VOCAB, ROWS = 300, 4
find_compiled = jax.jit(find_least_kept)
draw_compiled = jax.jit(draw_tokens)
head_compiled = jax.jit(find_head)
top_compiled = jax.jit(top_tokens, static_argnums=1)
noise_compiled = jax.jit(draw_noise)


def make_draws(logits: np.ndarray, samplings: list[Sampling], position: int = 0) -> Draws:
    rows = len(samplings)
    seeds = np.array([[0, s.seed] for s in samplings], np.uint32)
    return Draws(
        scaled=logits.astype(np.float32),
        top_k=np.array([s.top_k for s in samplings], np.int32),
        top_p=np.array([s.top_p for s in samplings], np.float32),
        min_p=np.array([s.min_p for s in samplings], np.float32),
        seeds=seeds,
        positions=np.full(rows, position, np.int32),
    )


def make_logits(seed: int, *, spread: float = 3.0, rows: int = ROWS) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (spread * generator.standard_normal((rows, VOCAB))).astype(np.float32)


cuts = st.builds(
    Sampling,
    top_k=st.sampled_from([0, 1, 2, 5, 127, 128, 129, 200, 299]),
    top_p=st.sampled_from([1e-4, 0.1, 0.5, 0.9, 0.99, 0.9999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-4, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 1 << 31),
)
batches = st.lists(cuts, min_size=ROWS, max_size=ROWS)


@pytest.mark.parametrize(("size", "count"), [(5, 5), (300, 128), (1300, 20), (20_001, 128)])
def test_the_likeliest_tokens_are_those_of_a_stable_sort(size: int, count: int) -> None:
    generator = np.random.default_rng(size)
    values = np.round(4 * generator.standard_normal((3, size))).astype(np.float32)
    values[1] = generator.standard_normal(size)

    best, tokens = top_compiled(values, count)

    order = np.argsort(-values, axis=-1, kind="stable")[:, :count]
    assert np.asarray(tokens).tolist() == order.tolist()
    assert np.asarray(best).tolist() == np.take_along_axis(values, order, -1).tolist()


@settings(max_examples=50)
@given(batches, st.integers(0, 50), st.sampled_from([0.1, 1.0, 3.0]))
def test_the_least_kept_is_that_of_a_sort(
    samplings: list[Sampling], seed: int, spread: float
) -> None:
    logits = make_logits(seed, spread=spread)

    found = np.asarray(find_compiled(make_draws(logits, samplings)))

    for row, sampling in enumerate(samplings):
        expected = reference.find_least_kept(logits[row].astype(np.float64), sampling)
        kept, expected_kept = (np.count_nonzero(logits[row] >= x) for x in (found[row], expected))
        # a sum of float32 may reach its part one token earlier or later
        assert abs(kept - expected_kept) <= (1 if 0 < sampling.top_p < 1 else 0)


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_the_nucleus_is_the_fewest_tokens_that_hold_top_p(top_p: float) -> None:
    logits = np.log(np.array([[0.5, 0.2, 0.15, 0.1, 0.05]], np.float32))
    kept = {1e-6: 1, 0.1: 1, 0.5: 1, 0.9: 4, 0.999: 5}

    least = find_least_kept(make_draws(logits + 0.01, [Sampling(top_p=top_p * 0.999)]))

    assert np.count_nonzero(logits + 0.01 >= np.asarray(least)) == kept[top_p]


def test_top_p_holds_its_part_of_what_top_k_leaves() -> None:
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))

    least = find_least_kept(make_draws(logits, [Sampling(top_k=2, top_p=0.5)]))

    assert np.count_nonzero(logits >= np.asarray(least)) == 1


@pytest.mark.parametrize(
    "sampling", [Sampling(top_k=2), Sampling(top_p=0.3), Sampling(top_k=2, top_p=0.9)]
)
def test_tokens_that_tie_with_the_last_one_are_kept(sampling: Sampling) -> None:
    draws = make_draws(np.zeros((1, VOCAB)), [sampling])

    assert np.asarray(find_least_kept(draws)).tolist() == [0]
    head = head_compiled(draws, np.ones(1, bool))
    assert np.asarray(head.least).tolist() == [0]
    assert np.asarray(head.rest).tolist() == [VOCAB]


def test_bits_of_negative_and_tiny_numbers_are_ordered() -> None:
    logits = np.array([[-3e38, -1.0, -1e-30, -0.0, 1e-30, 1.0]], np.float32)

    for top_k in range(1, 6):
        least = find_least_kept(make_draws(logits, [Sampling(top_k=top_k)]))
        assert np.asarray(least).tolist() == [logits[0, -top_k]]


@settings(max_examples=50)
@given(batches, st.integers(0, 50), st.sampled_from([0.1, 1.0, 3.0]), st.booleans())
def test_head_and_rest_are_together_what_the_row_keeps(
    samplings: list[Sampling], seed: int, spread: float, are_coarse: bool
) -> None:
    logits = make_logits(seed, spread=spread)
    logits = np.round(logits) if are_coarse else logits
    draws = make_draws(logits, samplings)

    head = jax.tree.map(np.asarray, head_compiled(draws, np.ones(ROWS, bool)))

    least = np.asarray(find_compiled(draws))
    for row, sampling in enumerate(samplings):
        kept = np.flatnonzero(logits[row] >= head.least[row])
        expected = np.flatnonzero(logits[row] >= least[row])
        in_head = head.tokens[row][
            (head.values[row] > head.border[row]) & (head.values[row] >= head.least[row])
        ]
        rest = np.setdiff1d(kept, in_head)
        if 0 < sampling.top_p < 1 and not are_coarse:
            assert abs(len(kept) - len(expected)) <= 1
        elif sampling.top_p >= 1:
            assert kept.tolist() == expected.tolist()
        assert len(in_head) < HEAD_TOKENS
        assert (head.rest[row] > 0) == (len(rest) > 0)
        weights = np.exp(logits[row].astype(np.float64) - logits[row].max())
        np.testing.assert_allclose(head.rest[row], weights[rest].sum(), rtol=1e-4)


def test_of_a_batch_only_the_rows_that_need_it_are_searched() -> None:
    logits = make_logits(1)
    samplings = [Sampling(top_k=200), Sampling(top_p=0.5), Sampling(), Sampling(top_k=3)]

    among_all = head_compiled(make_draws(logits, samplings), np.ones(ROWS, bool))
    searched = head_compiled(make_draws(logits, samplings), np.arange(ROWS) > 0)

    for all_rows, some_rows in zip(among_all, searched, strict=True):
        assert np.asarray(all_rows)[1:].tolist() == np.asarray(some_rows)[1:].tolist()


@pytest.mark.parametrize("size", [1, 127, 128, 129, 1000])
def test_the_likeliest_is_the_lowest_of_the_largest(size: int) -> None:
    values = np.round(np.random.default_rng(size).standard_normal((5, size))).astype(np.float32)
    values[1] = -np.inf

    assert np.asarray(pick_likeliest(values)).tolist() == values.argmax(-1).tolist()


def test_threefry_is_that_of_jax() -> None:
    words = np.random.default_rng(1).integers(0, 1 << 32, (4, 50), dtype=np.uint32)

    found = np.asarray(threefry(words[0], words[1], words[2], words[3]))

    for place, (high, low, x, y) in enumerate(words.T):
        expected = threefry_2x32(np.array([high, low]), np.array([x, y]))
        assert found[place] == np.asarray(expected)[0]


def test_noise_is_that_of_the_token_wherever_it_stands() -> None:
    draws = make_draws(np.zeros((2, VOCAB)), [Sampling(seed=1), Sampling(seed=2)], 3)
    every = np.asarray(draw_noise(draws, np.tile(np.arange(VOCAB, dtype=np.int32), (2, 1))))
    some = np.array([[7, 0, 299], [8, 7, 7]], np.int32)

    found = np.asarray(draw_noise(draws, some))

    assert found.tolist() == np.take_along_axis(every, some, -1).tolist()
    assert (every[0] != every[1]).all()


def test_noise_is_gumbel_noise() -> None:
    draws = make_draws(np.zeros((1, 1)), [Sampling(seed=5)], 7)

    noise = np.asarray(noise_compiled(draws, np.arange(1 << 18, dtype=np.int32)[None]))[0]

    # Kolmogorov and Smirnov: 1.95 / sqrt(n) is passed once in a thousand times
    expected = np.exp(-np.exp(-np.sort(noise).astype(np.float64)))
    places = np.arange(len(noise)) / len(noise)
    assert np.abs(expected - places).max() < 1.95 / np.sqrt(len(noise))
    assert len(np.unique(noise)) > 0.99 * len(noise)


@pytest.mark.parametrize("bits", [0, 1, (1 << 32) - 1])
def test_the_ends_of_the_noise_are_numbers(bits: int) -> None:
    uniform = (np.float32(bits) + np.float32(0.5)) * np.float32(2**-32)

    assert np.isfinite(np.asarray(to_gumbel(uniform)))


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(top_k=200), Sampling(top_p=0.8), Sampling(top_k=100, min_p=0.5)],
)
def test_frequencies_follow_the_softmax_of_what_is_kept(sampling: Sampling, spread: float) -> None:
    logits, count = make_logits(3, spread=spread, rows=1)[0], 1000
    draws = make_draws(
        np.tile(logits, (count, 1)), [replace(sampling, seed=seed) for seed in range(count)]
    )

    tokens = np.asarray(draw_compiled(draws, np.ones(count, bool)))

    least = reference.find_least_kept(logits.astype(np.float64), sampling)
    expected = np.exp(np.where(logits >= least, logits, -np.inf).astype(np.float64))
    expected *= count / expected.sum()
    found = np.bincount(tokens, minlength=VOCAB)
    often = expected >= 2
    squares = ((found - expected)[often] ** 2 / expected[often]).sum()
    # chi square: its mean is the number of its terms, its variance twice that
    assert squares < often.sum() + 4 * np.sqrt(2 * often.sum())
    assert not found[expected == 0].any()
