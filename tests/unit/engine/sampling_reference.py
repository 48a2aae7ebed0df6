"""What the sampler has to do with one row, in numpy and float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from pals.types import Sampling


def penalise(
    logits: np.ndarray,
    sampling: Sampling,
    prompt: Sequence[int] = (),
    answer: Sequence[int] = (),
    allowed: np.ndarray | None = None,
) -> np.ndarray:
    """Return the logits [V] with bias, penalties and mask."""
    x = logits.astype(np.float64)
    for token, bias in sampling.logit_bias:
        x[token] += bias
    repetition = sampling.repetition_penalty
    for token in {*prompt, *answer}:
        x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
    for token, count in Counter(answer).items():
        x[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
    return x if allowed is None else np.where(allowed, x, -np.inf)


def find_least_kept(scaled: np.ndarray, sampling: Sampling) -> float:
    """Return the least scaled logit (of [V]) that min_p, top_k and top_p keep."""
    descending = np.sort(scaled)[::-1]
    least = descending[0] + np.log(sampling.min_p) if sampling.min_p else -np.inf
    if 0 < sampling.top_k < len(scaled):
        least = max(least, descending[sampling.top_k - 1])
    if sampling.top_p < 1:
        weights = np.exp(descending - descending[0]) * (descending >= least)
        reached = np.cumsum(weights) >= sampling.top_p * weights.sum()
        least = max(least, descending[np.argmax(reached)])
    return float(least)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities [V]."""
    x = logits.astype(np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())
