"""What int8 and int4 cost in quality: the demo model's answers against its bf16 ones.

The model reads a text, window by window, and scores each next token. A setting's
`top1_agreement` is the part of the positions at which it ranks the same token first as
bf16 does, and `mean_kl` the mean of KL(bf16 || setting) in nats; `min` and `max` are over
windows. Layers are quantised, the embedding and the tied head are not. The demo model's
own source is Q4_1, so bf16 is not better here than 4 bits by groups of 32 already were.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from benchmarks.results import Result, Setting, Subject
from pals.engine.cache import lone_cache
from pals.models.build import AbstractModel
from pals.models.gguf import DEMO_MODEL_ID
from pals.models.hub import resolve_model
from pals.models.loading import load_shard_parameters
from pals.models.numerics import Numerics
from pals.models.paged import lone_row
from pals.models.quantized import FEW_ROWS
from pals.models.snapshot import Snapshot
from pals.text.tokenizer import Tokenizer
from pals.types import Dtype, GroupSize, LayerRange, Quantization

NAME = "quantize"
TEXT = Path(__file__).parent / "data" / "python_reference.txt"
SOURCE = "Q4_1"
WINDOW_TOKENS = 1024
QUICK_WINDOWS = 1
MANY_ROWS = 512

Scorer = Callable[[np.ndarray], jax.Array]
"""From a window of tokens [T] to logits [T, V]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One way to compute.

    Attributes:
        rows: Tokens of a step.
    """

    dtype: Dtype
    rows: int
    group_size: GroupSize = 128
    activations: bool = True

    @property
    def setting(self) -> Setting:
        setting: Setting = {"dtype": self.dtype, "rows": self.rows}
        if self.dtype == "int4":
            setting["group_size"] = self.group_size
        if self.dtype == "int8":
            setting["act_quant"] = "on" if self.activations else "off"
        return setting


REFERENCE = Route(dtype="bf16", rows=MANY_ROWS)
ROUTES = (
    Route(dtype="bf16", rows=FEW_ROWS),
    Route(dtype="int8", rows=FEW_ROWS),
    Route(dtype="int8", rows=MANY_ROWS),
    Route(dtype="int8", rows=MANY_ROWS, activations=False),
    *(
        Route(dtype="int4", rows=rows, group_size=size)
        for size in (128, 64, 32)
        for rows in (FEW_ROWS, MANY_ROWS)
    ),
)
"""Among them bf16 in other steps: no setting agrees with bf16 better than bf16 does."""


@dataclass(frozen=True, slots=True)
class Score:
    """How one window's logits compare with the reference's."""

    agreement: float
    kl: float


def run(*, quick: bool, report: Callable[[Result], None]) -> None:
    """Score every route and report its lines, when all windows were read.

    Args:
        quick: One window only.
        report: Given each line.
    """
    load = os.getloadavg()[0]
    snapshot = resolve_model(DEMO_MODEL_ID)
    windows = read_windows(snapshot.path)[: QUICK_WINDOWS if quick else None]
    for route, scores in zip(ROUTES, score_routes(snapshot, windows), strict=True):
        setting: Setting = {
            "model": DEMO_MODEL_ID,
            "source": SOURCE,
            "text": TEXT.name,
            "tokens": len(windows) * WINDOW_TOKENS,
            "device": jax.default_backend(),
            **route.setting,
        }
        subject = Subject(benchmark=NAME, system="pals", setting=setting, load=load)
        for metric, unit, values in (
            ("top1_agreement", "fraction", [score.agreement for score in scores]),
            ("mean_kl", "nat", [score.kl for score in scores]),
        ):
            line = subject.summarise(metric, unit, values)
            report(msgspec.structs.replace(line, value=float(np.mean(values))))


def read_windows(folder: Path) -> list[np.ndarray]:
    """Return the text's tokens in windows of equal length; the rest is left out."""
    tokens = Tokenizer.load(folder).encode(TEXT.read_text("utf-8"), add_special_tokens=False)
    count = len(tokens) // WINDOW_TOKENS
    return np.array_split(np.array(tokens[: count * WINDOW_TOKENS], np.int32), count)


def score_routes(snapshot: Snapshot, windows: Sequence[np.ndarray]) -> list[list[Score]]:
    """Compare every route with the reference, which reads each window once for all of them."""
    reference = open_route(snapshot, REFERENCE)
    scorers = [open_route(snapshot, route) for route in ROUTES]
    scores: list[list[Score]] = [[] for _ in ROUTES]
    for window in windows:
        wanted = reference(window)
        for own, scorer in zip(scores, scorers, strict=True):
            own.append(compare(wanted, scorer(window)))
    return scores


def open_route(snapshot: Snapshot, route: Route) -> Scorer:
    """Load the model as ``route`` holds it."""
    layers = LayerRange(0, snapshot.config.num_layers)
    quantization = Quantization(group_size=route.group_size, activations=route.activations)
    numerics = Numerics.of(route.dtype, quantization)
    model = AbstractModel.build(snapshot.config, layers, numerics)
    leaves = load_shard_parameters(snapshot, layers, numerics, model.parameters).leaves

    @partial(jax.jit, donate_argnums=1)
    def step(leaves, cache, tokens, start):  # noqa: ANN001, ANN202
        decoder = model.merge(leaves)
        row = lone_row(tokens.shape[0], start, cache[0][0].shape[1])
        hidden, cache = decoder(tokens, cache, *row)
        return decoder.forward_logits(hidden), cache

    def score(window: np.ndarray) -> jax.Array:
        cache = lone_cache(snapshot.config, layers, tokens=WINDOW_TOKENS, dtype=numerics.compute)
        parts: list[jax.Array] = []
        for start in range(0, len(window), route.rows):
            tokens = window[start : start + route.rows]
            logits, cache = step(leaves, cache, tokens, np.int32(start))
            parts.append(logits)
        return jnp.concatenate(parts)

    return score


@jax.jit
def _differences(wanted: jax.Array, got: jax.Array) -> tuple[jax.Array, jax.Array]:
    wanted, got = jax.nn.log_softmax(wanted), jax.nn.log_softmax(got)
    agreement = jnp.mean(wanted.argmax(-1) == got.argmax(-1))
    return agreement, jnp.mean(jnp.sum(jnp.exp(wanted) * (wanted - got), -1))


def compare(wanted: jax.Array, got: jax.Array) -> Score:
    """Return how logits [T, V] differ from those of the reference."""
    return Score(*map(float, _differences(wanted, got)))
