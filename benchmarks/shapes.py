"""Steps over a few layers of published shapes, in each kind of numbers.

The weights are random, as only their sizes matter for speed. A slice has no ends, as a
machine's in the middle of a chain.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.results import Result, Subject
from pals.engine.arrays import StepArrays
from pals.engine.batch import RowKind, Step, StepRow
from pals.engine.buckets import BatchLimits, Buckets, Program
from pals.engine.cache import build_cache
from pals.engine.stepping import StepArguments
from pals.engine.steps import Programs
from pals.models.configs import read_config
from pals.models.numerics import Numerics
from pals.types import Dtype, EngineLimits, LayerRange, SessionId

NAME = "shapes"
DTYPES: tuple[Dtype, ...] = ("bf16", "int8", "int4")
LIMITS = EngineLimits(max_rows=16, max_context_tokens=1024, max_chunk_tokens=256)
START = 200
"""Tokens that each decoding row has."""

ROW_PAGES = 4
"""That hold a row's tokens, or those of the chunk."""

NUM_PAGES = 1 + ROW_PAGES * LIMITS.max_rows

ROUNDS = 20
QUICK_ROUNDS = 4

LLAMA_8B: dict[str, object] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}
QWEN3_30B_A3B: dict[str, object] = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Some layers of a published model."""

    name: str
    config: dict[str, object]
    num_layers: int


SHAPES = (
    Shape(name="Llama 8B", config=LLAMA_8B, num_layers=4),
    Shape(name="Qwen3 30B-A3B", config=QWEN3_30B_A3B, num_layers=2),
)
STEPS: dict[str, tuple[int, int]] = {
    "decode, 1 row": (1, 0),
    "decode, 16 rows": (16, 0),
    "prefill, 256 tokens": (0, 256),
}
"""Rows of one token, and tokens of a chunk."""


def run(*, quick: bool, report: Callable[[Result], None]) -> None:
    """Measure each step of each shape.

    Args:
        quick: Fewer rounds, and the dense shape only.
        report: Given each line.
    """
    load = os.getloadavg()[0]
    for shape in SHAPES[:1] if quick else SHAPES:
        for dtype in DTYPES:
            for result in measure(shape, dtype, load, QUICK_ROUNDS if quick else ROUNDS):
                report(result)


def measure(shape: Shape, dtype: Dtype, load: float, rounds: int) -> Iterator[Result]:
    """Yield the times of the steps of one shape in one dtype."""
    config = read_config(shape.config)
    layers = LayerRange(1, 1 + shape.num_layers)
    numerics = Numerics.of(dtype)
    programs = Programs(config, layers, numerics=numerics, limits=LIMITS, num_pages=NUM_PAGES)
    leaves = random_leaves(programs)
    weight_bytes = sum(leaf.nbytes for leaf in leaves)
    subject = Subject(
        benchmark=NAME,
        system="pals",
        setting={
            "model": shape.name,
            "layers": shape.num_layers,
            "dtype": dtype,
            "device": jax.devices()[0].device_kind,
            "weight_bytes": weight_bytes,
        },
        load=load,
    )
    for name, (rows, chunk) in STEPS.items():
        arrays, program = fill(rows, chunk, np.zeros(config.hidden_size, numerics.compute))
        samples_ms = time_step(programs, leaves, program, arrays, rounds)
        of = replace(subject, setting={**subject.setting, "step": name})
        yield of.summarise("step_ms", "ms", samples_ms)


def fill(rows: int, chunk: int, empty: np.ndarray) -> tuple[StepArrays, Program]:
    """Return the arrays of a step: rows that decode, or a chunk that begins a prompt.

    Args:
        rows: Of one token.
        chunk: Tokens; 0 without one.
        empty: One token of inputs.
    """
    program = Buckets(BatchLimits.of(LIMITS)).choose(rows, 1, chunk, 1)
    assert program is not None
    kinds: list[tuple[RowKind, int, int]] = [("decode", START, 1)] * rows
    kinds += [("prefill", 0, chunk)] if chunk else []
    taken = [
        StepRow(
            session=SessionId(bytes(16)),
            kind=kind,
            position=position,
            tokens=tokens,
            pages=array("i", range(1 + number * ROW_PAGES, 1 + (number + 1) * ROW_PAGES)),
        )
        for number, (kind, position, tokens) in enumerate(kinds)
    ]
    last = taken[rows] if chunk else None
    step = Step(program=program, rows=tuple(taken[:rows]), chunk=last, copies=())
    draw = np.random.default_rng(0).standard_normal
    arrays = StepArrays(program, empty)
    arrays.fill(step, [draw((row.tokens, *empty.shape)).astype(empty.dtype) for row in taken])
    return arrays, program


def random_leaves(programs: Programs) -> tuple[jax.Array, ...]:
    """Return small random parameters of every dtype, made on the device."""

    def draw(number: int, shape: jax.ShapeDtypeStruct) -> jax.Array:
        key = jax.random.key(number)
        if jnp.issubdtype(shape.dtype, jnp.floating):
            scale = shape.shape[-1] ** -0.5
            return (jax.random.normal(key, shape.shape, jnp.bfloat16) * scale).astype(shape.dtype)
        return jax.random.randint(key, shape.shape, 0, 16, jnp.int8).astype(shape.dtype)

    make = jax.jit(draw, static_argnums=1)
    return tuple(make(number, shape) for number, shape in enumerate(programs.parameters.values()))


def time_step(
    programs: Programs,
    leaves: tuple[jax.Array, ...],
    program: Program,
    arrays: StepArrays,
    rounds: int,
) -> list[float]:
    """Return the milliseconds of each round; the first two warm up."""
    programs.compile(program)
    run_step = programs.get(program)
    cache = build_cache(programs.cache)
    samples: list[float] = []
    for _ in range(rounds + 2):
        started_s = time.perf_counter()
        outcome = run_step(StepArguments(leaves, cache, None, arrays.inputs, arrays.tables, None))
        cache = outcome.cache
        np.asarray(outcome.output)
        samples.append(1000 * (time.perf_counter() - started_s))
    return samples[2:]
