"""What the int8 codec costs in quality: the demo model in shards, with prompts written in it.

The model reads a text, window by window and chunk by chunk, and each chunk's hidden states
cross every boundary between shards as the prefill lane writes them. `top1_agreement` is the
part of the positions at which the same token ranks first as when they cross as they are, and
`mean_kl` the mean of KL(raw || int8) in nats; `min` and `max` are over windows. Then the
first half of each window is a prompt: `greedy_equal` is the part of the tokens of its greedy
answer, decoded without the codec, that stay the same, place by place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from benchmarks.quantize import TEXT, WINDOW_TOKENS, compare, read_windows
from benchmarks.results import Result, Setting, Subject
from pals.engine.cache import lone_cache
from pals.models.build import AbstractModel
from pals.models.gguf import DEMO_MODEL_ID
from pals.models.hub import resolve_model
from pals.models.loading import load_shard_parameters
from pals.models.numerics import Numerics
from pals.models.paged import lone_row
from pals.models.snapshot import Snapshot
from pals.net.codec import decode_int8, encode_int8
from pals.net.wire import INT8_BLOCK, Codec, hidden_shape
from pals.types import LayerRange, Quantization, split_layers

NAME = "codec"
SHARD_COUNTS = (2, 3, 6)
QUICK_SHARD_COUNTS = (3,)
WINDOWS = 8
QUICK_WINDOWS = 1
CHUNK_TOKENS = 256
PROMPT_TOKENS = 512
ANSWER_TOKENS = 32
NUMERICS = Numerics.of("bf16", Quantization())

Boundary = Callable[[jax.Array], jax.Array]
"""What hidden states [T, D] are on the other side of a link."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One shard of the model: its step, and the parameters that the step takes."""

    layers: LayerRange
    leaves: object
    step: Callable[..., tuple[jax.Array, object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How one window's logits and its answer compare with those of the raw chain."""

    agreement: float
    kl: float
    greedy_equal: float


def run(*, quick: bool, report: Callable[[Result], None]) -> None:
    """Score the codec in chains of several lengths and report their lines.

    Args:
        quick: One window of the text, and one chain.
        report: Given each line.
    """
    load = os.getloadavg()[0]
    snapshot = resolve_model(DEMO_MODEL_ID)
    windows = read_windows(snapshot.path)[: QUICK_WINDOWS if quick else WINDOWS]
    for count in QUICK_SHARD_COUNTS if quick else SHARD_COUNTS:
        scores = score_chain(snapshot, count, windows)
        setting: Setting = {
            "model": DEMO_MODEL_ID,
            "text": TEXT.name,
            "tokens": sum(map(len, windows)),
            "dtype": "bf16",
            "codec": "int8",
            "block": INT8_BLOCK,
            "shards": count,
            "device": jax.default_backend(),
        }
        subject = Subject(benchmark=NAME, system="pals", setting=setting, load=load)
        for metric, unit, values in (
            ("top1_agreement", "fraction", [score.agreement for score in scores]),
            ("mean_kl", "nat", [score.kl for score in scores]),
            ("greedy_equal", "fraction", [score.greedy_equal for score in scores]),
        ):
            line = subject.summarise(metric, unit, values)
            report(msgspec.structs.replace(line, value=float(np.mean(values))))
        report(subject.summarise("payload_ratio", "ratio", [payload_ratio(snapshot)]))


def payload_ratio(snapshot: Snapshot) -> float:
    """Return the bytes of a coded token over those of a raw one."""
    raw = hidden_shape(bytes(32), 1, "bf16", snapshot.config.hidden_size)
    return replace(raw, codec=Codec.INT8).token_bytes / raw.token_bytes


def score_chain(snapshot: Snapshot, count: int, windows: Sequence[np.ndarray]) -> list[Score]:
    """Compare a chain that writes prompts in int8 with the same chain without it."""
    stages = open_stages(snapshot, count)
    scores: list[Score] = []
    for window in windows:
        wanted, got = (read(snapshot, stages, window, b) for b in (as_is, through_int8))
        same = compare(wanted, got)
        prompt = window[:PROMPT_TOKENS]
        answers = [answer(snapshot, stages, prompt, b) for b in (as_is, through_int8)]
        equal = float(np.mean(np.equal(*answers)))
        scores.append(Score(agreement=same.agreement, kl=same.kl, greedy_equal=equal))
    return scores


def open_stages(snapshot: Snapshot, count: int) -> list[Stage]:
    """Load the model in shards of about as many layers each."""
    return [open_stage(snapshot, part) for part in split_layers(snapshot.config.num_layers, count)]


def open_stage(snapshot: Snapshot, layers: LayerRange) -> Stage:
    """Load one shard."""
    model = AbstractModel.build(snapshot.config, layers, NUMERICS)
    leaves = load_shard_parameters(snapshot, layers, NUMERICS, model.parameters).leaves
    is_tail = layers.stop == snapshot.config.num_layers

    @partial(jax.jit, donate_argnums=1)
    def step(leaves, cache, inputs, start):  # noqa: ANN001, ANN202
        decoder = model.merge(leaves)
        row = lone_row(inputs.shape[0], start, cache[0][0].shape[1])
        hidden, cache = decoder(inputs, cache, *row)
        return (decoder.forward_logits(hidden) if is_tail else hidden), cache

    return Stage(layers, leaves, step)


def as_is(hidden: jax.Array) -> jax.Array:
    """Send hidden states as they are."""
    return hidden


def through_int8(hidden: jax.Array) -> jax.Array:
    """Send hidden states through the codec."""
    coded = encode_int8(np.asarray(hidden.astype(jnp.float32)))
    return jnp.asarray(decode_int8(coded, hidden.shape[1])).astype(hidden.dtype)


class Session:
    """One sequence over a chain."""

    def __init__(self, snapshot: Snapshot, stages: Sequence[Stage]) -> None:
        self._stages = stages
        self._caches = [
            lone_cache(snapshot.config, stage.layers, tokens=WINDOW_TOKENS, dtype=NUMERICS.compute)
            for stage in stages
        ]
        self._position = 0

    def step(self, tokens: np.ndarray, boundary: Boundary) -> jax.Array:
        """Run the next tokens ``int32[T]`` and return their logits ``[T, V]``."""
        values: jax.Array | np.ndarray = tokens
        for i, stage in enumerate(self._stages):
            entering = values if i == 0 else boundary(values)
            start = np.int32(self._position)
            values, self._caches[i] = stage.step(stage.leaves, self._caches[i], entering, start)
        self._position += len(tokens)
        return values


def read(
    snapshot: Snapshot, stages: Sequence[Stage], window: np.ndarray, boundary: Boundary
) -> jax.Array:
    """Return the logits [T, V] of a window that is read as one prompt."""
    session = Session(snapshot, stages)
    starts = range(0, len(window), CHUNK_TOKENS)
    return jnp.concatenate([session.step(window[s : s + CHUNK_TOKENS], boundary) for s in starts])


def answer(
    snapshot: Snapshot, stages: Sequence[Stage], prompt: np.ndarray, boundary: Boundary
) -> list[int]:
    """Return the greedy answer to a prompt; only the prompt crosses ``boundary``."""
    session = Session(snapshot, stages)
    logits = [
        session.step(prompt[start : start + CHUNK_TOKENS], boundary)
        for start in range(0, len(prompt), CHUNK_TOKENS)
    ][-1]
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < ANSWER_TOKENS:
        logits = session.step(np.array(tokens[-1:], np.int32), as_is)
        tokens.append(int(logits[-1].argmax()))
    return tokens
