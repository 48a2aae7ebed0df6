"""How the answers of one request are drawn, and how many of them."""

from __future__ import annotations

import secrets

from pals.driver.interface import GenerateParams
from pals.types import Sampling


def made(params: GenerateParams) -> int:
    """Return how many answers are made, of which ``n`` are given."""
    return params.n if params.best_of is None else max(params.n, params.best_of)


def is_scored(params: GenerateParams) -> bool:
    """Return whether tokens come with their scores, for the caller or to choose by."""
    return params.logprobs is not None or made(params) > params.n


def sampling_of(params: GenerateParams, choice: int) -> Sampling:
    """Return how one of the answers is sampled: they differ by their seeds."""
    seed = secrets.randbits(64) if params.seed is None else params.seed + choice
    return Sampling(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        seed=seed % (1 << 64),
        logprobs=(params.logprobs or 0) if is_scored(params) else None,
    )
