"""The experts of one layer: one row and a prompt's, against what memory can do at most.

Qwen3 30B-A3B's layer with random weights. A row reads the experts that it chose, so the
least time is their bytes by the read bandwidth, which is measured in the same rounds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.line_child import LineChild, open_child
from benchmarks.moe_child import PALS, SORTED_BLOCKS, Ask, Job, Reads, Took
from benchmarks.results import Result, Subject

NAME = "moe"
SYSTEMS = (PALS, SORTED_BLOCKS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What to measure and how often."""

    num_experts: int
    rows: tuple[int, ...]
    rounds: int


FULL = Effort(num_experts=128, rows=(1, 8, 64, 512), rounds=7)
QUICK = Effort(num_experts=32, rows=(1, 64), rounds=3)


def run(*, quick: bool, report: Callable[[Result], None]) -> None:
    """Measure each number of rows.

    Args:
        quick: Fewer experts and rows.
        report: Given each line.

    Raises:
        BrokenPipeError: The process that computes ended.
    """
    effort = QUICK if quick else FULL
    load, threads = os.getloadavg()[0], os.cpu_count() or 1
    job = Job(num_experts=effort.num_experts, threads=threads)
    with open_child("benchmarks.moe_child", job, threads=threads) as child:
        device = child.ask(Ask(system="reads", rows=0), Reads).device
        subject = Subject(
            benchmark=NAME,
            system=PALS,
            setting={
                "model": "Qwen3 30B-A3B",
                "experts": effort.num_experts,
                "dtype": "bf16",
                "device": device,
                "threads": threads,
            },
            load=load,
        )
        for rows in effort.rows:
            limits, samples = take_turns(child, rows, effort.rounds)
            of = replace(subject, setting={**subject.setting, "rows": rows})
            for result in summarise(of, rows, limits, samples):
                report(result)


def take_turns(
    child: LineChild, rows: int, rounds: int
) -> tuple[list[float], dict[str, list[Took]]]:
    """Return the read bandwidth of each round, and what each way took in it."""
    limits: list[float] = []
    samples: dict[str, list[Took]] = {system: [] for system in SYSTEMS}
    for number in range(rounds + 1):
        limit = child.ask(Ask(system="reads", rows=0), Reads).bytes_per_s
        took = {system: child.ask(Ask(system=system, rows=rows), Took) for system in SYSTEMS}
        if number:  # the first round warms up
            limits.append(limit)
            for system in SYSTEMS:
                samples[system].append(took[system])
    return limits, samples


def summarise(
    subject: Subject,
    rows: int,
    limits: Sequence[float],
    samples: Mapping[str, Sequence[Took]],
) -> Iterator[Result]:
    """Yield the lines of one number of rows.

    Args:
        subject: What Pals's lines say of it.
        rows: Tokens of a step.
        limits: Bytes per second that memory was read with, one of each round.
        samples: Of each way, one of each round.
    """
    own, other = samples[PALS], samples[SORTED_BLOCKS]
    for system, took in samples.items():
        of = replace(subject, system=system)
        yield of.summarise("step_ms", "ms", [1000 * sample.seconds for sample in took])
        yield of.summarise("workspace_bytes", "bytes", [took[0].workspace_bytes])
    read = [sample.active_bytes / sample.seconds for sample in own]
    yield subject.compare("bandwidth_ratio", read, limits, to="read bandwidth")
    rates = [[rows / sample.seconds for sample in took] for took in (own, other)]
    yield subject.compare("throughput_ratio", *rates, to=SORTED_BLOCKS)
