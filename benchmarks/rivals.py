"""What others make of the demo's model's shape: llama.cpp in one process and split in three.

All layers in one process with one thread, and in equal parts over three RPC servers with one
thread each. What Pals does beside them is in `engine` (one process) and `batching` (three
shards). A rival that is not here is said to be missing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.llama_cpp import LlamaCpp, find_llama_cpp
from benchmarks.random_models import FOLDER, SMOLLM2_135M, GgufKind, open_checkpoint, open_gguf
from benchmarks.results import Result, Subject

NAME = "rivals"
SERVERS = 3
PROMPT_TOKENS = 128
PREFILL_TOKENS = 512
STEPS = 32
PROGRESSPALS = FOLDER.parent / "progresspals" / "bin" / "python"
"""It asks for other versions of what Pals needs, so it cannot be in Pals's environment."""

CHILD = Path(__file__).with_name("progresspals_child.py")
PROGRESSPALS_DEADLINE_S = 900.0
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
    if (result := measure_progresspals(effort.rounds)) is not None:
        report(result)
    llama_cpp = find_llama_cpp(threads=1)
    if llama_cpp is None:
        return
    for kind in effort.kinds:
        load = os.getloadavg()[0]
        samples = take_turns(llama_cpp, open_gguf(SMOLLM2_135M, kind), effort)
        for result in summarise(kind, samples, load):
            report(result)


def measure_progresspals(rounds: int) -> Result | None:
    """Return the speed of one session over three servers, or None and say what is missing."""
    if not PROGRESSPALS.exists():
        print(
            f"ProgressPals is missing: install it in an environment of its own, {PROGRESSPALS}",
            file=sys.stderr,
        )
        return None
    load, shape = os.getloadavg()[0], SMOLLM2_135M
    open_checkpoint(shape)
    numbers = (shape.num_layers, SERVERS, STEPS, rounds + 1)
    done = subprocess.run(
        [PROGRESSPALS, CHILD, shape.folder, *map(str, numbers)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        timeout=PROGRESSPALS_DEADLINE_S,
    )
    rates = json.loads(done.stdout)[1:]  # the first answer warms up
    setting = {"model": shape.name, "dtype": "BF16", "device": "cpu", "threads": 1, "sessions": 1}
    subject = Subject(benchmark=NAME, system="ProgressPals", setting=setting, load=load)
    return subject.summarise("total_tokens_per_s", "tokens/s", rates)


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
