import jax
import numpy as np
import pytest

from pals.engine.sampler import build_sampling_rows, keep_nucleus, sample
from pals.errors import InvalidStep
from pals.types import Sampling

VOCAB = 50
sample_compiled = jax.jit(lambda logits, rows, positions: sample(logits, rows, positions))


def draw_logits(rows, seed=0):
    return 3 * np.random.default_rng(seed).standard_normal((rows, VOCAB)).astype(np.float32)


def choose(logits, samplings, positions):
    rows = build_sampling_rows(samplings, len(samplings))
    return np.asarray(sample_compiled(logits, rows, np.array(positions, np.int32))).tolist()


def test_greedy_rows_take_the_most_likely_token():
    logits = draw_logits(4)

    assert choose(logits, [Sampling()] * 4, range(4)) == logits.argmax(-1).tolist()


def test_token_depends_on_seed_and_position_only():
    logits = np.repeat(draw_logits(1), 4, axis=0)
    hot = [Sampling(temperature=2.0, seed=seed) for seed in (1, 1, 2, 1)]
    tokens = np.array([choose(logits, hot, [p, p, p, p + 1]) for p in range(20)])

    assert (tokens[:, 0] == tokens[:, 1]).all()
    assert (tokens[:, 0] != tokens[:, 2]).any()
    assert (tokens[1:, 0] == tokens[:-1, 3]).all()
    assert len(set(tokens[:, 0])) > 3


@pytest.mark.parametrize("others", [Sampling(), Sampling(temperature=1.5, top_p=0.4, seed=9)])
@pytest.mark.parametrize(
    "own", [Sampling(), Sampling(temperature=1.0, seed=3), Sampling(temperature=1.0, top_p=0.7)]
)
def test_token_does_not_depend_on_the_batch(own, others):
    logits = draw_logits(4)

    for position in range(10):
        alone = choose(logits[2:3], [own], [position])
        together = choose(logits, [others, others, own, others], [5, 6, position, 7])
        assert together[2:3] == alone


def test_halves_of_a_large_seed_both_count():
    logits = np.repeat(draw_logits(1), 3, axis=0)
    seeds = (7, 7 + (1 << 32), -1)
    hot = [Sampling(temperature=2.0, seed=seed) for seed in seeds]
    tokens = np.array([choose(logits, hot, [p] * 3) for p in range(20)])

    assert (tokens[:, 0] != tokens[:, 1]).any()
    assert (tokens[:, 0] != tokens[:, 2]).any()


def test_frequencies_follow_the_softmax():
    logits = np.array([[0.0, 1.0, 2.0]], np.float32)
    count = 4000
    rows = build_sampling_rows([Sampling(temperature=2.0, seed=s) for s in range(count)], count)

    tokens = sample(np.repeat(logits, count, axis=0), rows, np.zeros(count, np.int32))

    expected = np.exp(logits[0] / 2) / np.exp(logits[0] / 2).sum()
    found = np.bincount(np.asarray(tokens), minlength=3) / count
    np.testing.assert_allclose(found, expected, atol=0.03)


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_nucleus_is_the_fewest_tokens_that_hold_top_p(top_p):
    logits = draw_logits(3)

    kept = np.isfinite(np.asarray(keep_nucleus(logits, np.full(3, top_p, np.float32))))

    for row in range(3):
        probabilities = np.exp(logits[row].astype(np.float64))
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities)
        count = int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1
        assert set(np.flatnonzero(kept[row])) == set(order[:count])


def test_nucleus_of_one_keeps_every_token():
    logits = np.array([[0.0, -80.0, -100.0]], np.float32)

    assert np.isfinite(keep_nucleus(logits, np.ones(1, np.float32))).all()


def test_tokens_that_tie_with_the_last_one_are_kept():
    logits = np.zeros((1, 4), np.float32)

    assert np.isfinite(keep_nucleus(logits, np.full(1, 0.3, np.float32))).all()


def test_tokens_outside_the_nucleus_are_never_drawn():
    logits = np.repeat(draw_logits(1), 200, axis=0)
    samplings = [Sampling(temperature=2.0, top_p=0.3, seed=s) for s in range(200)]
    kept = np.isfinite(keep_nucleus(logits[:1] / 2, np.full(1, 0.3, np.float32)))[0]

    tokens = choose(logits, samplings, [0] * 200)

    assert set(tokens) <= set(np.flatnonzero(kept))
    assert len(set(tokens)) > 1


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=-0.1),
        Sampling(temperature=2.1),
        Sampling(temperature=float("nan")),
        Sampling(top_p=0.0),
        Sampling(top_p=1.1),
        Sampling(top_p=float("inf")),
    ],
)
def test_values_out_of_range_are_refused(sampling):
    with pytest.raises(InvalidStep):
        build_sampling_rows([sampling], 1)
