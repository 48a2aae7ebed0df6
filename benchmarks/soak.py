"""Whether memory grows under minutes of load: every process of `pals demo`'s swarm.

Users of `benchmarks.api` ask the endpoint over three shards without a pause. Resident memory
is read from Linux's /proc, of every process that this one started.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import trio

from benchmarks.api import LOCUST, TimedAnswer, run_users
from benchmarks.api import QUICK as FEW
from benchmarks.load_child import read_memory
from benchmarks.results import Result, Subject
from pals import config
from pals.cli.demo import PRESET, Endpoint, open_swarm
from pals.cli.interrupt import run_until_signal
from pals.models.hub import resolve_model
from pals.types import split_layers

NAME = "soak"
SHARDS = 3
USERS = 8
LOAD_S = 600
QUICK_LOAD_S = 30
READINGS = 10
ROLES = ("backend", "shard", "serve")

Reading = Mapping[int, int]
"""Resident bytes by process id."""


def run(*, quick: bool, report: Callable[[Result], None]) -> None:
    """Load the endpoint, and report the memory of each process on the way.

    Args:
        quick: For half a minute.
        report: Given each line.

    Raises:
        ModelError: The model cannot be found or loaded.
        ChildFailed: A process of the swarm did not come up.
        CalledProcessError: Locust failed, or an answer did.
        KeyboardInterrupt: A signal came.
    """
    if not os.access(LOCUST, os.X_OK):
        print("locust is missing: `make rivals` installs it", file=sys.stderr)
        return
    load_s = QUICK_LOAD_S if quick else LOAD_S

    async def measure_all() -> None:
        for result in await measure(load_s):
            report(result)

    if trio.run(run_until_signal, measure_all):
        raise KeyboardInterrupt


async def measure(load_s: int) -> list[Result]:
    """Return the lines of one swarm under load."""
    model, load = config.load_settings(PRESET).demo.model, os.getloadavg()[0]
    layers = split_layers(resolve_model(model).config.num_layers, SHARDS)
    setting = {"model": model, "shards": SHARDS, "sessions": USERS, "load_s": load_s}
    subject = Subject(benchmark=NAME, system="pals", setting=setting, load=load)
    async with open_swarm(model, layers, 1, on_progress=lambda _: None) as endpoint:
        roles = children()
        answers, readings = await _load(endpoint, roles, load_s)
    return list(summarise(subject, roles, readings, len(answers)))


async def _load(
    endpoint: Endpoint, processes: Mapping[int, str], load_s: int
) -> tuple[list[TimedAnswer], list[Reading]]:
    readings: list[Reading] = []

    async def read() -> None:
        for _ in range(READINGS):
            await trio.sleep(load_s / READINGS)
            readings.append({process: read_memory("VmRSS", process) for process in processes})

    effort = replace(FEW, window_s=load_s)
    ask = partial(run_users, endpoint, effort, USERS, "soak")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        answers = await trio.to_thread.run_sync(ask, abandon_on_cancel=True)
    return answers, readings


def children() -> dict[int, str]:
    """Return the role of each process of Pals that this one started, by its id."""
    found: dict[int, str] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            words = (stat.parent / "cmdline").read_bytes().decode().split("\0")
        except (OSError, IndexError):
            continue  # it has just ended
        role = next((word for word in words if word in ROLES), None)
        if parent == os.getpid() and role is not None:
            found[int(stat.parent.name)] = role
    return found


def summarise(
    subject: Subject, roles: Mapping[int, str], readings: Sequence[Reading], answers: int
) -> Iterator[Result]:
    """Yield the memory of each process, and its last reading by its second."""
    yield subject.summarise("answers", "answers", [answers])
    for number, (process, role) in enumerate(roles.items()):
        of = replace(subject, setting={**subject.setting, "process": f"{role} {number}"})
        own = [reading[process] for reading in readings]
        yield of.summarise("resident_bytes", "bytes", own)
        to = f"after 2 of {len(readings)} parts"
        yield of.compare("resident_memory_ratio", own[-1:], own[1:2], to=to)
