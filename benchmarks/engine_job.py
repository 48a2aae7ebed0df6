"""What the engine benchmark asks its systems, each in a process of its own."""

from __future__ import annotations

from typing import Literal

import msgspec

from benchmarks.random_models import LLAMA_8B, QUICK, QWEN3_600M, Shape
from pals.types import Dtype

SHAPES: dict[str, Shape] = {shape.name: shape for shape in (LLAMA_8B, QWEN3_600M, QUICK)}

PROMPT_TOKENS = 128
"""Held by every row before it decodes."""

PREFILL_TOKENS = 512
MAX_ROWS = 32
WARMUP_STEPS = 2


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What to load, and with how many threads to compute."""

    shape: str
    dtype: Dtype
    threads: int


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to the first question: the model is loaded."""

    device: str
    weight_bytes: int


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """What to do once more.

    Attributes:
        kind: ``load`` waits for the model, ``decode`` runs steps of one token of each row,
            ``prefill`` one prompt of `PREFILL_TOKENS` tokens.
        rows: Of a decode step.
        steps: Of decode, after `WARMUP_STEPS`.
    """

    kind: Literal["load", "decode", "prefill"]
    rows: int = 1
    steps: int = 1


class Took(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one step, or of the prompt."""

    seconds: float
