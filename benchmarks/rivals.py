"""What others make of the demo's model's shape: llama.cpp in one process and split in three.

All layers in one process with one thread, and in equal parts over three RPC servers with one
thread each. What Pals does beside them is in `engine` (one process) and `batching` (three
shards). A rival that is not here is said to be missing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

from benchmarks.llama_cpp import LlamaCpp, find_llama_cpp
from benchmarks.random_models import SMOLLM2_135M, GgufKind, open_gguf
from benchmarks.results import Result, Subject

NAME = "rivals"
SERVERS = 3
PROMPT_TOKENS = 128
PREFILL_TOKENS = 512
STEPS = 32
KINDS: tuple[GgufKind, ...] = ("BF16", "Q8_0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What to measure and how often."""

    kinds: tuple[GgufKind, ...]
    rows: tuple[int, ...]
    rounds: int


FULL = Effort(kinds=KINDS, rows=(1, 4, 8, 16), rounds=5)
QUICK = Effort(kinds=KINDS[:1], rows=(1, 4), rounds=2)


@dataclass(slots=True)
class Samples:
    """Tokens per second, one of each round.

    Attributes:
        prefill: Of a prompt in one process.
        alone: Of sequences in one process, by how many there are.
        split: And over the servers.
    """

    prefill: list[float] = field(default_factory=list[float])
    alone: list[dict[int, float]] = field(default_factory=list[dict[int, float]])
    split: list[dict[int, float]] = field(default_factory=list[dict[int, float]])


def run(*, quick: bool, report: Callable[[Result], None]) -> None:
    """Measure the rivals that are here.

    Args:
        quick: One kind of numbers, fewer rounds.
        report: Given each line.

    Raises:
        CalledProcessError: A rival failed.
    """
    effort = QUICK if quick else FULL
    if find_spec("progresspals") is None:
        print("ProgressPals is missing: `pip install progresspals`", file=sys.stderr)
    llama_cpp = find_llama_cpp(threads=1)
    if llama_cpp is None:
        return
    for kind in effort.kinds:
        load = os.getloadavg()[0]
        samples = take_turns(llama_cpp, open_gguf(SMOLLM2_135M, kind), effort)
        for result in summarise(kind, samples, load):
            report(result)


def take_turns(llama_cpp: LlamaCpp, model: Path, effort: Effort) -> Samples:
    """Run one process and three servers, round after round; one round before warms up."""
    samples = Samples()
    with llama_cpp.open_servers(SERVERS) as servers:
        for number in range(effort.rounds + 1):
            prefill = llama_cpp.prefill_rate(model, PREFILL_TOKENS)
            alone, split = (
                llama_cpp.decode_rates(
                    model,
                    rows=effort.rows,
                    prompt_tokens=PROMPT_TOKENS,
                    steps=STEPS,
                    servers=where,
                )
                for where in ((), servers)
            )
            if number:
                samples.prefill.append(prefill)
                samples.alone.append(alone)
                samples.split.append(split)
    return samples


def summarise(kind: GgufKind, samples: Samples, load: float) -> Iterator[Result]:
    """Yield the lines of one kind of numbers."""
    setting = {"model": SMOLLM2_135M.name, "dtype": kind, "device": "cpu", "threads": 1}
    one = Subject(benchmark=NAME, system="llama.cpp", setting=setting, load=load)
    prompt = replace(one, setting={**setting, "prompt_tokens": PREFILL_TOKENS})
    yield prompt.summarise("prefill_tokens_per_s", "tokens/s", samples.prefill)
    for rows in samples.alone[0]:
        of = replace(one, setting={**setting, "sessions": rows})
        rpc = replace(of, system="llama.cpp RPC")
        alone = [round_[rows] for round_ in samples.alone]
        split = [round_[rows] for round_ in samples.split]
        yield of.summarise("total_tokens_per_s", "tokens/s", alone)
        yield rpc.summarise("total_tokens_per_s", "tokens/s", split)
        yield rpc.compare("total_tokens_ratio", split, alone, to="one process")
