"""The engine in one process: decode and prefill beside PyTorch and llama.cpp.

All compute with as many threads and take turns, round after round, so that a ratio is of
one round. Models have published shapes and random weights. Of Pals every step is planned,
run and sampled as a shard does it.
"""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from subprocess import CalledProcessError

from benchmarks.bandwidth import ReadLimit
from benchmarks.engine_child import CACHE
from benchmarks.engine_job import PREFILL_TOKENS, PROMPT_TOKENS, Ask, Job, Ready, Took
from benchmarks.engine_rules import measure_rules
from benchmarks.line_child import NO_VARIABLES, LineChild, open_child
from benchmarks.llama_cpp import LlamaCpp, find_llama_cpp
from benchmarks.random_models import (
    LLAMA_8B,
    QUICK,
    QWEN3_600M,
    GgufKind,
    Shape,
    open_checkpoint,
    open_gguf,
)
from benchmarks.results import Result, Subject
from pals.types import Dtype

NAME = "engine"
PALS, TORCH, LLAMA_CPP = "pals", "torch", "llama.cpp"
DTYPES: tuple[Dtype, ...] = ("bf16", "int8")
GGUF_KINDS: dict[Dtype, GgufKind] = {"bf16": "BF16", "int8": "Q8_0"}
SETTLE_S = 0.25
"""OpenMP's threads spin for about so long after their work; the next system waits for that."""

PREFILL = 0
"""Stands for a prompt where others are rows of a decode step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What to measure and how long.

    Attributes:
        shapes: Of models.
        rows: Of decode steps.
        steps: Of each sample.
        rounds: Samples of each cell.
    """

    shapes: tuple[Shape, ...]
    rows: tuple[int, ...]
    steps: int
    rounds: int


FULL_EFFORT = Effort(shapes=(LLAMA_8B, QWEN3_600M), rows=(1, 8, 32), steps=8, rounds=5)
QUICK_EFFORT = Effort(shapes=(QUICK,), rows=(1, 8), steps=4, rounds=3)

Rates = dict[int, float]
"""Rows of a decode step, or `PREFILL`, and the tokens per second."""


def run(*, quick: bool, report: Callable[[Result], None]) -> None:
    """Measure the rules of the formulation, then each shape in each kind of numbers.

    Args:
        quick: One small shape.
        report: Given each line.

    Raises:
        BrokenPipeError: A system ended.
        CalledProcessError: llama.cpp ran once, and then failed.
    """
    effort = QUICK_EFFORT if quick else FULL_EFFORT
    threads = os.cpu_count() or 1
    for result in measure_rules(benchmark=NAME, quick=quick, threads=threads):
        report(result)
    for shape in effort.shapes:
        for dtype in DTYPES:
            with Contest(shape, dtype, threads, effort) as contest:
                for result in contest.measure():
                    report(result)


# --- the systems ---------------------------------------------------------------------


class Contest:
    """All systems that can run a shape in one kind of numbers; a context manager."""

    def __init__(self, shape: Shape, dtype: Dtype, threads: int, effort: Effort) -> None:
        self._shape = shape
        self._dtype: Dtype = dtype
        self._threads = threads
        self._effort = effort
        self._load = os.getloadavg()[0]
        self._stack = ExitStack()
        self._limit = ReadLimit(threads)

    def __enter__(self) -> Contest:
        open_checkpoint(self._shape)
        pals = self._open("benchmarks.engine_child", CACHE)
        self._ready = pals.ask(Ask(kind="load"), Ready)
        self._systems: dict[str, Callable[[], Rates]] = {PALS: partial(self._ask_child, pals)}
        if find_spec("torch") is None:
            print("torch is missing: `make parity-install` brings it", file=sys.stderr)
        elif self._dtype == "bf16":
            torch = self._open("benchmarks.engine_torch")
            torch.ask(Ask(kind="load"), Ready)
            self._systems[TORCH] = partial(self._ask_child, torch)
        if (llama_cpp := find_llama_cpp(self._threads)) is not None:
            model = open_gguf(self._shape, GGUF_KINDS[self._dtype])
            self._systems[LLAMA_CPP] = partial(self._ask_llama_cpp, llama_cpp, model)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def measure(self) -> list[Result]:
        """Let the systems take turns and return the lines."""
        self._warm_up()
        rates: defaultdict[str, list[Rates]] = defaultdict(list)
        limits: list[float] = []
        for _ in range(self._effort.rounds):
            limits.append(self._limit.measure())
            for name, system in self._systems.items():
                time.sleep(SETTLE_S)
                rates[name].append(system())
        return list(summarise(self._subject(), rates, limits, self._ready.weight_bytes))

    def _warm_up(self) -> None:
        """Let each system run once, and leave llama.cpp out where it cannot."""
        for name, system in list(self._systems.items()):
            try:
                system()
            except CalledProcessError as error:
                print(f"{name} fails and is left out: {error}", file=sys.stderr)
                del self._systems[name]

    def _subject(self) -> Subject:
        return Subject(
            benchmark=NAME,
            system=PALS,
            setting={
                "model": self._shape.name,
                "dtype": self._dtype,
                "device": self._ready.device,
                "threads": self._threads,
            },
            load=self._load,
        )

    def _open(self, module: str, variables: dict[str, str] | None = None) -> LineChild:
        job = Job(shape=self._shape.name, dtype=self._dtype, threads=self._threads)
        return self._stack.enter_context(
            open_child(module, job, threads=self._threads, variables=variables or NO_VARIABLES)
        )

    def _ask_child(self, child: LineChild) -> Rates:
        steps = self._effort.steps
        decode = {
            rows: rows / child.ask(Ask(kind="decode", rows=rows, steps=steps), Took).seconds
            for rows in self._effort.rows
        }
        return decode | {PREFILL: PREFILL_TOKENS / child.ask(Ask(kind="prefill"), Took).seconds}

    def _ask_llama_cpp(self, llama_cpp: LlamaCpp, model: Path) -> Rates:
        effort = self._effort
        decode = llama_cpp.decode_rates(
            model, rows=effort.rows, prompt_tokens=PROMPT_TOKENS, steps=effort.steps
        )
        return decode | {PREFILL: llama_cpp.prefill_rate(model, PREFILL_TOKENS)}


# --- the lines -----------------------------------------------------------------------


def summarise(
    pals: Subject, rates: dict[str, list[Rates]], limits: list[float], weight_bytes: int
) -> Iterator[Result]:
    """Yield the lines of one shape in one kind of numbers.

    Args:
        pals: What Pals's lines say of it.
        rates: Of each system, one of each round.
        limits: Bytes per second that memory was read with, one of each round.
        weight_bytes: That a step of decode reads.
    """
    yield pals.summarise("read_bandwidth", "bytes/s", limits)
    for cell in rates[PALS][0]:
        samples = {name: [round_[cell] for round_ in rounds] for name, rounds in rates.items()}
        of = replace(pals, setting={**pals.setting, **_describe(cell)})
        kind = "prefill" if cell == PREFILL else "decode"
        for name, own in samples.items():
            yield replace(of, system=name).summarise(f"{kind}_tokens_per_s", "tokens/s", own)
        for name, others in samples.items():
            if name != PALS:
                yield of.compare(f"{kind}_ratio", samples[PALS], others, to=name)
        if cell != PREFILL:
            read = [weight_bytes * rate / cell for rate in samples[PALS]]
            yield of.compare("bandwidth_ratio", read, limits, to="read bandwidth")


def _describe(cell: int) -> dict[str, int]:
    return {"prompt_tokens": PREFILL_TOKENS} if cell == PREFILL else {"sessions": cell}
