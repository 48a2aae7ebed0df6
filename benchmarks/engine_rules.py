"""What each rule of the formulation gains, one small measurement each.

A rule is a program against the same computation written otherwise, or against the same
program in a process that was started otherwise. Both take turns.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace

from benchmarks.line_child import LineChild, open_child
from benchmarks.results import Result, Subject
from benchmarks.rules_child import Ask, Job, Ready, Took

ROUNDS = 5
QUICK_ROUNDS = 2
SIZE = 4096
QUICK_SIZE = 1024

USUAL = "usual"
SMALL_PAGES = "small pages"
FLAGS = {
    "oneDNN": "--xla_cpu_use_onednn=true",
    "wide vectors": "--xla_cpu_prefer_vector_width=512",
}
"""What is said most often to make XLA faster on CPUs, as processes that are started so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A program of `benchmarks.rules_child`, in a process that was started somehow."""

    program: str
    process: str = USUAL


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Two ways, of which the first one is the product's.

    Attributes:
        to: What people call the other one.
    """

    name: str
    way: Way
    other: Way
    to: str


RULES = (
    Rule(
        name="two rows",
        way=Way(program="two rows"),
        other=Way(program="one row"),
        to="one row",
    ),
    Rule(
        name="sum of one row",
        way=Way(program="sum of one row"),
        other=Way(program="two rows"),
        to="two rows",
    ),
    Rule(
        name="one row read in place",
        way=Way(program="one row read in place"),
        other=Way(program="sum of one row"),
        to="sum of one row",
    ),
    Rule(
        name="int8 read in place",
        way=Way(program="int8 read in place"),
        other=Way(program="two planes of int8"),
        to="two planes",
    ),
    Rule(
        name="matrix on the left",
        way=Way(program="matrix on the left"),
        other=Way(program="matrix on the right"),
        to="matrix on the right",
    ),
    Rule(
        name="sums in float32",
        way=Way(program="sums in float32"),
        other=Way(program="sums in bfloat16"),
        to="sums in bfloat16",
    ),
    Rule(
        name="barrier before attention",
        way=Way(program="barrier"),
        other=Way(program="no barrier"),
        to="no barrier",
    ),
    Rule(
        name="unrolled layers",
        way=Way(program="unrolled"),
        other=Way(program="scan"),
        to="scan over stacked weights",
    ),
    Rule(
        name="huge pages",
        way=Way(program="one row"),
        other=Way(program="one row", process=SMALL_PAGES),
        to="small pages",
    ),
    *(
        Rule(
            name="empty XLA_FLAGS",
            way=Way(program="sums in float32"),
            other=Way(program="sums in float32", process=process),
            to=flag,
        )
        for process, flag in FLAGS.items()
    ),
)


def measure_rules(*, benchmark: str, quick: bool, threads: int) -> Iterator[Result]:
    """Yield the lines of every rule that this version of jax can be asked about."""
    job = Job(size=QUICK_SIZE if quick else SIZE, threads=threads)
    with ExitStack() as stack:
        processes = {
            USUAL: stack.enter_context(_open(job, {})),
            SMALL_PAGES: stack.enter_context(_open(job, {}, huge_pages=False)),
        }
        ready = processes[USUAL].ask(Ask(program=""), Ready)
        for name, flag in FLAGS.items():
            child = stack.enter_context(_open(job, {"XLA_FLAGS": flag}))
            if _comes_up(child, flag):
                processes[name] = child
        subject = Subject(
            benchmark=benchmark,
            system="xla",
            setting={
                "device": ready.device,
                "jax": ready.jax,
                "threads": threads,
                "size": job.size,
            },
            load=os.getloadavg()[0],
        )
        for rule in RULES:
            if rule.other.process in processes:
                samples = take_turns(processes, rule, QUICK_ROUNDS if quick else ROUNDS)
                yield from summarise_rule(subject, rule, samples)


def _open(
    job: Job, variables: Mapping[str, str], *, huge_pages: bool = True
) -> AbstractContextManager[LineChild]:
    return open_child(
        "benchmarks.rules_child",
        job,
        threads=job.threads,
        huge_pages=huge_pages,
        variables=variables,
    )


def _comes_up(child: LineChild, flag: str) -> bool:
    """Return whether XLA took a flag; it ends the process over one that it does not know."""
    try:
        child.ask(Ask(program=""), Ready)
    except BrokenPipeError:
        print(f"this version of jax does not know {flag}", file=sys.stderr)
        return False
    return True


def take_turns(
    processes: Mapping[str, LineChild], rule: Rule, rounds: int
) -> list[tuple[float, float]]:
    """Return the seconds of a rule's two ways in each round; one round before warms up."""

    def ask(way: Way) -> float:
        return processes[way.process].ask(Ask(program=way.program), Took).seconds

    return [(ask(rule.way), ask(rule.other)) for _ in range(rounds + 1)][1:]


def summarise_rule(
    subject: Subject, rule: Rule, samples: list[tuple[float, float]]
) -> Iterator[Result]:
    """Yield the milliseconds of both ways, and how many times faster the first one is."""
    own, other = zip(*samples, strict=True)
    of = replace(subject, setting={**subject.setting, "rule": rule.name})
    yield of.summarise("step_ms", "ms", [1000 * s for s in own])
    yield of.compare("throughput_ratio", [1 / s for s in own], [1 / s for s in other], to=rule.to)
