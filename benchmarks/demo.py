"""`pals demo`'s swarm of 1, 2 and 3 shards, and the same model in one process.

Real processes on loopback, asked through OpenAI's own client, one request at a time. All
systems answer the same prompt with as many tokens and compute with as many threads. They
run side by side and answer in turns, round after round: whatever else the machine does
then slows all of them, and the ratios within a round still hold.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import msgspec
import trio

from benchmarks.one_process import Job, Ready, Timing
from benchmarks.results import Result, Setting, Subject
from pals import config
from pals.cli.demo import (
    PRESET,
    Answer,
    Endpoint,
    HopLine,
    Request,
    ask,
    fetch_hops,
    open_swarm,
)
from pals.cli.interrupt import run_until_signal
from pals.cli.process import HUGE_PAGES, MALLOC_VARIABLE
from pals.models.hub import resolve_model
from pals.types import split_layers

NAME = "demo"
SHARD_COUNTS = (1, 2, 3)
ONE_PROCESS = "one-process"
ONE_PROCESS_DEADLINE_S = 300.0
PROMPT = "Write a short story about a lighthouse keeper who finds a letter in a bottle."

Line = TypeVar("Line", Ready, Timing)
Asker = Callable[[], Awaitable[Timing | Answer]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long to measure; the first round warms up."""

    rounds: int
    max_tokens: int


FULL = Effort(rounds=9, max_tokens=64)
QUICK = Effort(rounds=4, max_tokens=16)


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One side of the comparison and what came of it.

    Attributes:
        subject: What its lines say of it.
        samples: Its answers, one of each round.
        hops: The timings of its shards; empty for one process.
    """

    subject: Subject
    samples: Sequence[Timing | Answer]
    hops: Sequence[HopLine] = ()

    @property
    def rates(self) -> list[float]:
        return [sample.tokens_per_s for sample in self.samples]


def run(*, quick: bool, report: Callable[[Result], None]) -> None:
    """Measure one process and each number of shards.

    Args:
        quick: Fewer requests and tokens.
        report: Given each line.

    Raises:
        ModelError: The model cannot be found or loaded.
        ChildFailed: A process of a swarm did not come up.
        OSError: The one process ended.
        TooSlowError: The one process did not answer in time.
        KeyboardInterrupt: A signal came.
    """
    effort = QUICK if quick else FULL
    systems: list[System] = []

    async def measure_all() -> None:
        systems.extend(await measure(effort))

    if trio.run(run_until_signal, measure_all):
        raise KeyboardInterrupt
    for result in summarise(systems):
        report(result)


def summarise(systems: Sequence[System]) -> list[Result]:
    """Return the lines of one process and of swarms with more and more shards, in this order."""
    one_process, smallest, *_ = systems
    results: list[Result] = []
    for system in systems:
        subject, rates = system.subject, system.rates
        latencies = [sample.time_to_first_token_s for sample in system.samples]
        results.append(subject.summarise("decode_tokens_per_s", "tokens/s", rates))
        results.append(subject.summarise("time_to_first_token_s", "s", latencies))
        results += summarise_hops(subject, system.hops)
        if system is not one_process:
            others = one_process.rates
            results.append(subject.compare("decode_ratio", rates, others, to=ONE_PROCESS))
        if system not in (one_process, smallest):
            others = smallest.rates
            results.append(subject.compare("decode_ratio", rates, others, to="1 shard"))
    return results


def summarise_hops(subject: Subject, hops: Sequence[HopLine]) -> list[Result]:
    """Return where the time of one decode step goes; each shard's median is a sample."""
    parts = {
        "hop_compute_ms": [hop.step_ms for hop in hops],
        "hop_queue_ms": [hop.queue_ms for hop in hops],
        "hop_handover_ms": [hop.handover_ms for hop in hops],
        "hop_codec_ms": [hop.codec_ms for hop in hops],
        "hop_wire_ms": [hop.wire_ms for hop in hops],
        "hop_software_ms": [hop.hop_ms for hop in hops],
    }
    return [subject.summarise(name, "ms", samples) for name, samples in parts.items() if samples]


# --- the systems ---------------------------------------------------------------------


async def measure(effort: Effort) -> list[System]:
    """Start every system and let each answer once in every round."""
    job = Job(
        model=config.load_settings(PRESET).demo.model,
        prompt=PROMPT,
        max_tokens=effort.max_tokens,
        threads=max(1, (os.cpu_count() or 1) // max(SHARD_COUNTS)),
    )
    load = os.getloadavg()[0]
    async with AsyncExitStack() as stack:
        alone = stack.enter_context(open_one_process(job))
        swarms = [
            await stack.enter_async_context(_open_swarm(job, count)) for count in SHARD_COUNTS
        ]
        device = await alone.wait_until_ready()
        askers: list[Asker] = [alone.ask, *(partial(_ask, swarm, job) for swarm in swarms)]
        rounds = [[await asker() for asker in askers] for _ in range(effort.rounds)]
        hops = [await fetch_hops(swarm) for swarm in swarms]
    samples = list(zip(*rounds[1:], strict=True))
    subject = Subject(benchmark=NAME, system=ONE_PROCESS, setting=_setting(job, device), load=load)
    return [
        System(subject=subject, samples=samples[0]),
        *(
            System(subject=_chain(subject, count), samples=answers, hops=lines)
            for count, answers, lines in zip(SHARD_COUNTS, samples[1:], hops, strict=True)
        ),
    ]


def _setting(job: Job, device: str) -> Setting:
    return {
        "model": job.model,
        "dtype": config.load_settings(PRESET).shard.dtype,
        "device": device,
        "threads": job.threads,
        "sessions": 1,
        "max_tokens": job.max_tokens,
    }


def _chain(subject: Subject, shards: int) -> Subject:
    return replace(subject, system="pals", setting={**subject.setting, "shards": shards})


@asynccontextmanager
async def _open_swarm(job: Job, count: int) -> AsyncGenerator[Endpoint]:
    layers = split_layers(resolve_model(job.model).config.num_layers, count)
    async with open_swarm(job.model, layers, job.threads, on_progress=_ignore) as swarm:
        yield swarm


async def _ask(swarm: Endpoint, job: Job) -> Answer:
    request = Request(prompt=job.prompt, max_tokens=job.max_tokens)
    return await trio.to_thread.run_sync(
        partial(ask, swarm, request, on_text=_ignore), abandon_on_cancel=True
    )


def _ignore(_: str) -> None:
    """Show neither progress nor text: standard output is for results."""


class OneProcess:
    """The running process of `benchmarks.one_process`; made by `open_one_process`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    async def wait_until_ready(self) -> str:
        """Wait for the model to be loaded and return the kind of device it is on."""
        return (await self._read_line(Ready)).device

    async def ask(self) -> Timing:
        """Let it answer once more."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return await self._read_line(Timing)

    async def _read_line(self, kind: type[Line]) -> Line:
        assert self._process.stdout is not None
        read = self._process.stdout.readline
        with trio.fail_after(ONE_PROCESS_DEADLINE_S):
            line = await trio.to_thread.run_sync(read, abandon_on_cancel=True)
        if not line:
            raise BrokenPipeError(f"the one process ended with status {self._process.wait()}")
        return msgspec.json.decode(line, type=kind)


@contextmanager
def open_one_process(job: Job) -> Generator[OneProcess]:
    """Run the whole model in one process until the block ends."""
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.one_process", msgspec.json.encode(job).decode()],
        env=config.child_environment({MALLOC_VARIABLE: HUGE_PAGES}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for this program, which ends it
    ) as process:
        try:
            yield OneProcess(process)
        finally:
            process.kill()
