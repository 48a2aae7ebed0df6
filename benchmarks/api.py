"""The OpenAI endpoint beside llama-server: the demo's model, the same requests, BF16 in both.

Users stream answers and ask again as soon as they are answered: when the first token comes,
what lies between two, and how many come in all. Pals over three shards with a thread each and
as one shard with as many threads as llama-server has. All run side by side and are asked in
turns, round after round, by locust, which has an environment of its own (`make rivals`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import quantiles

import msgspec
import trio

from benchmarks.demo_gguf import open_demo_gguf
from benchmarks.llama_cpp import LlamaCpp, find_llama_cpp
from benchmarks.random_models import FOLDER
from benchmarks.results import Result, Subject
from pals import config
from pals.cli.demo import PRESET, Endpoint, open_swarm
from pals.cli.interrupt import run_until_signal
from pals.models.hub import resolve_model
from pals.types import split_layers

NAME = "api"
LLAMA_SERVER = "llama-server"
SHARD_COUNTS = (3, 1)
LOCUST = FOLDER.parent / "locust" / "bin" / "locust"
USERS_FILE = Path(__file__).with_name("api_users.py")
ENDS = (0, 2)
"""Tokens that may not come, so that every answer has the same length in both."""

CONTEXT = 512
WARM_UP_S = 3
GRACE_S = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What to measure and how long.

    Attributes:
        users: At a time.
        window_s: In which they ask.
        tokens: Of each answer.
        rounds: Samples of each cell.
    """

    users: tuple[int, ...]
    window_s: int
    tokens: int
    rounds: int


FULL = Effort(users=(1, 8, 32, 64), window_s=15, tokens=64, rounds=3)
QUICK = Effort(users=(1, 4), window_s=3, tokens=16, rounds=1)


class TimedAnswer(msgspec.Struct, frozen=True):
    """A line of `benchmarks.api_users`, by its clock.

    Attributes:
        arrivals_s: When parts of the text came.
        tokens: That they hold together.
    """

    began_s: float
    arrivals_s: list[float]
    tokens: int


@dataclass(frozen=True, slots=True)
class Window:
    """What users saw in one round.

    Attributes:
        tokens_per_s: Of all users.
        first_s: Until the first token, of each answer that began in it.
        gaps_s: Between two parts of an answer.
    """

    tokens_per_s: float
    first_s: list[float]
    gaps_s: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One endpoint, and what came of it by the number of users."""

    subject: Subject
    endpoint: Endpoint
    windows: dict[int, list[Window]] = field(default_factory=dict[int, list[Window]])


def run(*, quick: bool, report: Callable[[Result], None]) -> None:
    """Measure Pals, and llama-server where it is built.

    Args:
        quick: Fewer users and tokens.
        report: Given each line.

    Raises:
        ModelError: The model cannot be found or loaded.
        ChildFailed: A process of a swarm did not come up.
        CalledProcessError: Locust failed, or an answer did.
        TimeoutError: llama-server did not load the model in time.
        KeyboardInterrupt: A signal came.
    """
    if not os.access(LOCUST, os.X_OK):
        print("locust is missing: `make rivals` installs it", file=sys.stderr)
        return
    effort = QUICK if quick else FULL
    systems: list[System] = []

    async def measure_all() -> None:
        systems.extend(await measure(effort))

    if trio.run(run_until_signal, measure_all):
        raise KeyboardInterrupt
    for result in summarise(systems):
        report(result)


# --- what is measured ----------------------------------------------------------------


async def measure(effort: Effort) -> list[System]:
    """Start every endpoint and ask each in every round."""
    async with AsyncExitStack() as stack:
        systems = await _open_systems(stack, effort)
        for system in systems:
            await _ask(system, replace(effort, window_s=WARM_UP_S), max(effort.users), salt="-")
        for number in range(effort.rounds):
            for users in effort.users:
                for system in systems:
                    window = await _ask(system, effort, users, salt=f"{number}-{users}")
                    system.windows.setdefault(users, []).append(window)
    return systems


async def _open_systems(stack: AsyncExitStack, effort: Effort) -> list[System]:
    threads = os.cpu_count() or 1
    model, load = config.load_settings(PRESET).demo.model, os.getloadavg()[0]
    setting = {"model": model, "dtype": "bf16", "device": "cpu", "max_tokens": effort.tokens}
    subject = Subject(benchmark=NAME, system="pals", setting=setting, load=load)
    systems: list[System] = []
    for count in SHARD_COUNTS:
        each = max(1, threads // count)
        endpoint = await stack.enter_async_context(_open_pals(model, count, each, effort))
        of = replace(subject, setting={**setting, "shards": count, "threads": each * count})
        systems.append(System(subject=of, endpoint=endpoint))
    if (rival := find_llama_cpp(threads)) is not None:
        url = stack.enter_context(_open_llama_server(rival, effort))
        of = replace(subject, system=LLAMA_SERVER, setting={**setting, "threads": threads})
        systems.append(System(subject=of, endpoint=Endpoint(url=url, model=model)))
    return systems


@asynccontextmanager
async def _open_pals(
    model: str, count: int, threads: int, effort: Effort
) -> AsyncGenerator[Endpoint]:
    layers = split_layers(resolve_model(model).config.num_layers, count)
    rows = ("--rows", str(max(effort.users)))
    async with open_swarm(
        model, layers, threads, shard_options=rows, on_progress=lambda _: None
    ) as endpoint:
        yield endpoint


def _open_llama_server(rival: LlamaCpp, effort: Effort) -> AbstractContextManager[str]:
    return rival.open_endpoint(open_demo_gguf(), slots=max(effort.users), context=CONTEXT)


async def _ask(system: System, effort: Effort, users: int, *, salt: str) -> Window:
    answers = await trio.to_thread.run_sync(
        partial(run_users, system.endpoint, effort, users, salt), abandon_on_cancel=True
    )
    return see(answers, users, effort.window_s)


def run_users(endpoint: Endpoint, effort: Effort, users: int, salt: str) -> list[TimedAnswer]:
    """Let users ask an endpoint for a while, and return the answers that they got.

    Raises:
        CalledProcessError: Locust failed, or an answer did.
    """
    with tempfile.TemporaryDirectory(prefix="pals-api-") as name:
        out = Path(name) / "answers.jsonl"
        variables = {
            "API_USERS_MODEL": endpoint.model,
            "API_USERS_TOKENS": str(effort.tokens),
            "API_USERS_BANNED": ",".join(map(str, ENDS)),
            "API_USERS_SALT": salt,
            "API_USERS_OUT": str(out),
        }
        numbers = ("-u", users, "-r", users, "-t", f"{effort.window_s}s", "-s", GRACE_S)
        done = subprocess.run(
            [LOCUST, "-f", USERS_FILE, "--headless", "--only-summary", "-H", endpoint.url]
            + [str(number) for number in numbers],
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=effort.window_s + 2 * GRACE_S,
        )
        if done.returncode:
            print(done.stdout, file=sys.stderr)
        done.check_returncode()
        return [msgspec.json.decode(line, type=TimedAnswer) for line in out.open("rb")]


def see(answers: Sequence[TimedAnswer], users: int, window_s: float) -> Window:
    """Return what the answers say of the time in which all users asked."""
    begins = sorted(answer.began_s for answer in answers)
    start_s, stop_s = begins[users - 1], begins[0] + window_s
    inside = [answer for answer in answers if start_s <= answer.began_s < stop_s]
    tokens = 0.0
    gaps: list[float] = []
    for answer in answers:
        part = answer.tokens / len(answer.arrivals_s)
        tokens += part * sum(start_s <= at < stop_s for at in answer.arrivals_s)
        gaps += [b - a for a, b in pairwise(answer.arrivals_s) if start_s <= b < stop_s]
    first = [answer.arrivals_s[0] - answer.began_s for answer in inside]
    return Window(tokens / (stop_s - start_s), first, gaps)


# --- the lines -----------------------------------------------------------------------


def summarise(systems: Sequence[System]) -> Iterator[Result]:
    """Yield the lines of every endpoint, and those of Pals beside llama-server."""
    rivals = [system for system in systems if system.subject.system == LLAMA_SERVER]
    for system in systems:
        for users, windows in system.windows.items():
            of = replace(system.subject, setting={**system.subject.setting, "sessions": users})
            yield from _lines(of, windows)
            for rival in rivals:
                if rival is not system:
                    yield from _compare(of, windows, rival.windows[users])


def _lines(subject: Subject, windows: Sequence[Window]) -> Iterator[Result]:
    yield subject.summarise("total_tokens_per_s", "tokens/s", [w.tokens_per_s for w in windows])
    for percent in (50, 99):
        first = [percentile(window.first_s, percent) for window in windows]
        gaps = [1e3 * percentile(window.gaps_s, percent) for window in windows]
        yield subject.summarise(f"time_to_first_token_p{percent}_s", "s", first)
        yield subject.summarise(f"inter_token_p{percent}_ms", "ms", gaps)
    longest = replace(subject, setting={**subject.setting, "to": "the median of the round"})
    waits = [max(window.first_s) / percentile(window.first_s, 50) for window in windows]
    yield longest.summarise("longest_first_token_ratio", "ratio", waits)


def _compare(
    subject: Subject, windows: Sequence[Window], others: Sequence[Window]
) -> Iterator[Result]:
    own, theirs = ([each.tokens_per_s for each in side] for side in (windows, others))
    yield subject.compare("total_tokens_ratio", own, theirs, to=LLAMA_SERVER)
    own, theirs = ([percentile(each.first_s, 50) for each in side] for side in (windows, others))
    yield subject.compare("time_to_first_token_ratio", own, theirs, to=LLAMA_SERVER)


def percentile(samples: Sequence[float], percent: int) -> float:
    """Return the value that ``percent`` of the samples do not pass; the largest of few."""
    if len(samples) < 2:
        return samples[0]
    return quantiles(samples, n=100, method="inclusive")[percent - 1]
