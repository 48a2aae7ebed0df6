"""The transport against py-libp2p's own and against bare sockets, on loopback.

Two processes, each with all three systems; they take turns, round after round, so that
whatever else the machine does slows all of them. A request of 2 KB is answered with 2 KB;
1 MiB is answered with one byte; processor time is that of both processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import msgspec
import trio

from benchmarks.results import Result, Subject
from benchmarks.transport_child import (
    ANSWER,
    CPU,
    REQUEST,
    SECONDS,
    Addresses,
    Pipe,
    open_pipes,
)
from pals import config

NAME = "transport"
REQUEST_BYTES = 2048
TRANSFER_BYTES = 1 << 20
DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long to measure; the first round warms up."""

    rounds: int
    requests: int
    transfers: int


FULL = Effort(rounds=12, requests=500, transfers=100)
QUICK = Effort(rounds=5, requests=200, transfers=30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What one system did in one round.

    Attributes:
        request_us: Median round trip of a request.
        mb_per_s: Throughput of transfers, one after another.
        cpu_ms_per_mb: Processor time of both processes for them.
    """

    request_us: float
    mb_per_s: float
    cpu_ms_per_mb: float


def run(*, quick: bool, report: Callable[[Result], None]) -> None:
    """Measure each system and compare ours with the others.

    Args:
        quick: Fewer requests and rounds.
        report: Given each line.

    Raises:
        OSError: The answering process ended.
        TooSlowError: It did not answer in time.
    """
    effort = QUICK if quick else FULL
    load = os.getloadavg()[0]
    with answering_process() as addresses:
        samples = trio.run(measure, addresses, effort)
    for result in summarise(samples, load):
        report(result)


def summarise(samples: dict[str, Sequence[Sample]], load: float) -> list[Result]:
    """Return the lines of each system, and the ratios of ours to the others."""
    setting = {"request_bytes": REQUEST_BYTES, "transfer_bytes": TRANSFER_BYTES}
    results: list[Result] = []
    columns = {system: _columns(taken) for system, taken in samples.items()}
    for system, own in columns.items():
        subject = Subject(benchmark=NAME, system=system, setting=setting, load=load)
        for (metric, unit), values in own.items():
            results.append(subject.summarise(metric, unit, values))
        if system == "pals":
            for other in ("stock", "raw-trio"):
                results += [
                    subject.compare(f"{key[0]}_ratio", own[key], columns[other][key], to=other)
                    for key in own
                ]
    return results


def _columns(samples: Sequence[Sample]) -> dict[tuple[str, str], list[float]]:
    return {
        ("request_us", "us"): [sample.request_us for sample in samples],
        ("throughput_mb_per_s", "MB/s"): [sample.mb_per_s for sample in samples],
        ("cpu_ms_per_mb", "ms"): [sample.cpu_ms_per_mb for sample in samples],
    }


async def measure(addresses: Addresses, effort: Effort) -> dict[str, list[Sample]]:
    """Let each system take its turn in every round."""
    samples: dict[str, list[Sample]] = {}
    async with open_pipes(addresses) as pipes:
        for _ in range(effort.rounds):
            for system, pipe in pipes.items():
                with trio.fail_after(DEADLINE_S):
                    samples.setdefault(system, []).append(await _take_turn(pipe, effort))
    return {system: taken[1:] for system, taken in samples.items()}


async def _take_turn(pipe: Pipe, effort: Effort) -> Sample:
    round_trips = [
        await _ask(pipe, ANSWER, bytes(REQUEST_BYTES), REQUEST_BYTES)
        for _ in range(effort.requests)
    ]
    cpu_s = await _cpu_s(pipe)
    transfer = bytes(TRANSFER_BYTES)
    seconds = sum([await _ask(pipe, ANSWER, transfer, 1) for _ in range(effort.transfers)])
    megabytes = TRANSFER_BYTES * effort.transfers / 1e6
    return Sample(
        request_us=median(round_trips) * 1e6,
        mb_per_s=megabytes / seconds,
        cpu_ms_per_mb=(await _cpu_s(pipe) - cpu_s) * 1e3 / megabytes,
    )


async def _ask(pipe: Pipe, kind: int, data: bytes, reply: int) -> float:
    """Return the seconds from a request to the end of its reply."""
    message = REQUEST.pack(kind, len(data), reply) + data
    started_s = time.perf_counter()
    await pipe.write(message)
    await pipe.read_exactly(reply)
    return time.perf_counter() - started_s


async def _cpu_s(pipe: Pipe) -> float:
    """Return the processor time that both processes have used so far."""
    await pipe.write(REQUEST.pack(CPU, 0, SECONDS.size))
    theirs = SECONDS.unpack(await pipe.read_exactly(SECONDS.size))[0]
    return theirs + time.process_time()


@contextmanager
def answering_process() -> Generator[Addresses]:
    """Run the process that answers, and yield where it listens."""
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.transport_child"],
        env=config.child_environment({}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for this program, which ends it
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise BrokenPipeError(f"the answering process ended with {process.wait()}")
            yield msgspec.json.decode(line, type=Addresses)
        finally:
            process.kill()
