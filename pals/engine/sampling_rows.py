"""How each row of a step is sampled, as the one host array that the compiled step takes.

No jax: sessions are checked when they open, and a row costs its step one copy of 48 bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pals.errors import InvalidStep
from pals.types import Sampling

MAX_VOCAB_SIZE = 1 << 18
MAX_TEMPERATURE = 2.0
MAX_PENALTY = 2.0
MAX_BIAS = 100.0
MAX_BIASES = 300
MAX_LOGPROBS = 20

_ROW = struct.Struct("=6f6I")
ROW_WORDS = _ROW.size // 4
"""Of a row: six float32 (temperature, top_p, min_p, repetition, presence, frequency), then
top_k, both halves of the seed, slot, is_counted and wanted logprobs."""

_PADDING = _ROW.pack(0, 1, 0, 1, 0, 0, *[0] * 6)


@dataclass(frozen=True, slots=True)
class RowSampling:
    """The `Sampling` of a session, and what the sampler's bank holds of it.

    Raises:
        InvalidStep: A value is out of its range.

    Attributes:
        slot: Its row of the `Bank`; 0 for a session that needs none.
        is_counted: Whether the step counts the token for the penalties, as it does for all
            but drafts: of these `count_tokens` counts the accepted ones.
        packed: The row's words.
    """

    sampling: Sampling
    slot: int = 0
    is_counted: bool = True
    packed: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sampling = self.sampling
        check_sampling(sampling)
        packed = _ROW.pack(
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
            sampling.top_k,
            sampling.seed >> 32,
            sampling.seed & 0xFFFFFFFF,
            self.slot,
            self.is_counted,
            0 if sampling.logprobs is None else 1 + sampling.logprobs,
        )
        object.__setattr__(self, "packed", packed)

    def as_draft(self) -> RowSampling:
        """Return the same for a token that the step must not count yet."""
        return replace(self, is_counted=False)


def build_sampling_rows(samplings: Sequence[RowSampling | None], size: int) -> np.ndarray:
    """Return uint32 [size, ROW_WORDS], what `sample` takes as rows.

    Args:
        samplings: One for each sampled token; None for a row that only pads.
        size: Rows of the step; those past ``samplings`` only pad, too.

    Raises:
        InvalidStep: There are more than ``size``.
    """
    if len(samplings) > size:
        raise InvalidStep(problem=f"{len(samplings)} samplings for {size} rows")
    packed = b"".join(_PADDING if row is None else row.packed for row in samplings)
    packed += _PADDING * (size - len(samplings))
    return np.frombuffer(packed, np.uint32).reshape(size, ROW_WORDS)


def needs_slot(sampling: Sampling) -> bool:
    """Return whether the tokens so far, or a bias, change the session's logits."""
    penalties = (sampling.presence_penalty, sampling.frequency_penalty)
    return any(penalties) or sampling.repetition_penalty != 1 or bool(sampling.logit_bias)


def check_sampling(sampling: Sampling, vocab_size: int = MAX_VOCAB_SIZE) -> None:
    """Raise unless every value is finite and in range.

    Raises:
        InvalidStep: One is not; it is named with its value.
    """
    repetition = sampling.repetition_penalty
    ranges = [
        ("temperature", sampling.temperature, 0, MAX_TEMPERATURE),
        ("top_p", sampling.top_p, 0, 1),
        ("min_p", sampling.min_p, 0, 1),
        ("top_k", sampling.top_k, 0, vocab_size),
        ("repetition_penalty", repetition, 0, MAX_PENALTY),
        ("presence_penalty", sampling.presence_penalty, -MAX_PENALTY, MAX_PENALTY),
        ("frequency_penalty", sampling.frequency_penalty, -MAX_PENALTY, MAX_PENALTY),
        ("seed", sampling.seed, 0, (1 << 64) - 1),
        ("logprobs", sampling.logprobs or 0, 0, MAX_LOGPROBS),
    ]
    for name, value, least, most in ranges:
        if not least <= value <= most:  # so NaN is refused
            raise InvalidStep(problem=f"{name} {value} is not in [{least}, {most}]")
    if sampling.top_p == 0 or repetition == 0:
        raise InvalidStep(problem=f"top_p {sampling.top_p}, repetition_penalty {repetition}: "
                          "neither can be 0")  # fmt: skip
    _check_biases(sampling.logit_bias, vocab_size)


def _check_biases(biases: Sequence[tuple[int, float]], vocab_size: int) -> None:
    if len(biases) > MAX_BIASES:
        raise InvalidStep(problem=f"logit_bias has {len(biases)} of at most {MAX_BIASES} tokens")
    if len({token for token, _ in biases}) < len(biases):
        raise InvalidStep(problem="logit_bias names a token twice")
    for token, bias in biases:
        if not 0 <= token < vocab_size:
            raise InvalidStep(problem=f"logit_bias token {token} is not in [0, {vocab_size})")
        if not (math.isfinite(bias) and abs(bias) <= MAX_BIAS):
            raise InvalidStep(problem=f"logit_bias {bias} is not in [{-MAX_BIAS:g}, {MAX_BIAS:g}]")
