"""`pals demo`'s swarm of 1, 2 and 3 shards, and the same model in one process.

Real processes on loopback, asked through OpenAI's own client, one request at a time. All
systems answer the same prompt with as many tokens and compute with as many threads.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import msgspec
import trio

from benchmarks.one_process import Job, Report, Timing
from benchmarks.results import Result, Subject, compare
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
ONE_PROCESS_DEADLINE_S = 600.0
PROMPT = "Write a short story about a lighthouse keeper who finds a letter in a bottle."

Sample = Timing | Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long to measure; the first request warms up."""

    requests: int
    max_tokens: int


FULL = Effort(requests=8, max_tokens=64)
QUICK = Effort(requests=4, max_tokens=24)


def run(*, quick: bool, report: Callable[[Result], None]) -> None:
    """Measure one process and each number of shards, one after the other.

    Args:
        quick: Fewer requests and tokens.
        report: Given each line as soon as it is known.

    Raises:
        ModelError: The model cannot be found or loaded.
        ChildFailed: A process of a swarm did not come up.
        CalledProcessError: The one process failed.
        KeyboardInterrupt: A signal came.
    """
    effort = QUICK if quick else FULL
    job = Job(
        model=config.load_settings(PRESET).demo.model,
        prompt=PROMPT,
        max_tokens=effort.max_tokens,
        requests=effort.requests,
        threads=max(1, (os.cpu_count() or 1) // max(SHARD_COUNTS)),
    )
    load = os.getloadavg()[0]
    alone = _run_one_process(job)
    subject = Subject(
        benchmark=NAME, system=ONE_PROCESS, setting=_setting(job, alone.device), load=load
    )
    rates: dict[int, Result] = {}
    one_process = _report_speed(subject, alone.timings, report)
    for count in SHARD_COUNTS:
        chain = replace(
            subject,
            system="pals",
            setting={**subject.setting, "shards": count},
            load=os.getloadavg()[0],
        )
        answers, hops = _run_swarm(job, count)
        rates[count] = _report_speed(chain, answers, report)
        for line in hop_results(chain, hops):
            report(line)
        report(compare(rates[count], one_process, metric="decode_ratio", to=ONE_PROCESS))
        if count != 1:
            report(compare(rates[count], rates[1], metric="decode_ratio", to="1 shard"))


def _setting(job: Job, device: str) -> dict[str, str | int | float]:
    return {
        "model": job.model,
        "dtype": config.load_settings(PRESET).shard.dtype,
        "device": device,
        "threads": job.threads,
        "sessions": 1,
        "max_tokens": job.max_tokens,
    }


def _report_speed(
    subject: Subject, samples: Sequence[Sample], report: Callable[[Result], None]
) -> Result:
    """Report rate and latency; return the rate, which comparisons are made of."""
    rate = subject.summarise("decode_tokens_per_s", "tokens/s", [s.tokens_per_s for s in samples])
    report(rate)
    latencies = [s.time_to_first_token_s for s in samples]
    report(subject.summarise("time_to_first_token_s", "s", latencies))
    return rate


def hop_results(subject: Subject, hops: Sequence[HopLine]) -> list[Result]:
    """Return where the time of one decode step goes; each shard's median is a sample.

    Args:
        subject: The swarm.
        hops: Its shards, as `GET /pals/chain` tells of them.
    """
    parts = {
        "hop_compute_ms": [hop.step_ms for hop in hops],
        "hop_queue_ms": [hop.queue_ms for hop in hops],
        "hop_codec_ms": [hop.codec_ms for hop in hops],
        "hop_wire_ms": [hop.wire_ms for hop in hops],
        "hop_software_ms": [hop.hop_ms for hop in hops],
    }
    return [subject.summarise(metric, "ms", samples) for metric, samples in parts.items()]


# --- the systems ---------------------------------------------------------------------


def _run_one_process(job: Job) -> Report:
    completed = subprocess.run(
        [sys.executable, "-m", "benchmarks.one_process", msgspec.json.encode(job).decode()],
        env=config.child_environment({MALLOC_VARIABLE: HUGE_PAGES}),
        stdout=subprocess.PIPE,
        check=True,
        timeout=ONE_PROCESS_DEADLINE_S,
    )
    return msgspec.json.decode(completed.stdout, type=Report)


def _run_swarm(job: Job, count: int) -> tuple[list[Answer], list[HopLine]]:
    """Return the answers of a swarm of ``count`` shards, and its shards' timings."""
    answers: list[Answer] = []
    hops: list[HopLine] = []
    layers = split_layers(resolve_model(job.model).config.num_layers, count)

    async def measure() -> None:
        async with open_swarm(job.model, layers, job.threads, on_progress=_ignore) as swarm:
            answers.extend([await _ask(swarm, job) for _ in range(job.requests)])
            hops.extend(await fetch_hops(swarm))

    if trio.run(run_until_signal, measure):
        raise KeyboardInterrupt
    return answers[1:], hops


async def _ask(swarm: Endpoint, job: Job) -> Answer:
    request = Request(prompt=job.prompt, max_tokens=job.max_tokens)
    return await trio.to_thread.run_sync(
        partial(ask, swarm, request, on_text=_ignore), abandon_on_cancel=True
    )


def _ignore(_: str) -> None:
    """Show neither progress nor text: standard output is for results."""
