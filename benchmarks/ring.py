"""Where the time of a ring of shards goes, on loopback and over links with a delay.

Real shard processes and a driver in this one, without HTTP. Every member is dialled through
the link emulator, but for loopback, where nothing stands between them. A turn of the ring is
from one token of a session to its next; what of it is neither a step nor a delay is software.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace

import msgspec
import trio

from benchmarks import emulator_error, ring_members, ring_shard
from benchmarks.link_emulator import Conditions, EmulatedLink, LinkEmulator, open_emulator
from benchmarks.makespan import ideal_makespan_s
from benchmarks.results import Result, Subject
from benchmarks.ring_report import (
    Answer,
    Round,
    measure_cipher_ms,
    summarise_decode,
    summarise_parts,
)
from benchmarks.streams import Prompts, open_stream
from pals import config
from pals.cli.interrupt import run_until_signal
from pals.cli.process import HUGE_PAGES, MALLOC_VARIABLE
from pals.driver.routes import ServedModel
from pals.driver.sessions import SessionClient, open_sessions
from pals.models.hub import resolve_model
from pals.types import EngineLimits, split_layers

NAME = "ring"
PRESET = "loopback-3"
START_DEADLINE_S = 300.0
DECODE_PROMPT_TOKENS = 32
LONG_PROMPT_TOKENS = 2048
LIMITS = EngineLimits(max_sessions=2, max_context_tokens=2304, max_chunk_tokens=256)
LONG_LINK = Conditions(delay_s=0.05, bytes_per_s=100e6 / 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What to measure and how long.

    Attributes:
        shard_counts: Lengths of the chain.
        delays_s: Of one hop; 0 is loopback.
        rounds: Sessions of each setting; one before them warms up.
        max_tokens: Of each session.
        prompts: Long prompts, each a sample of the time to its first token.
    """

    shard_counts: tuple[int, ...]
    delays_s: tuple[float, ...]
    rounds: int
    max_tokens: int
    prompts: int


FULL = Effort(
    shard_counts=(1, 2, 3, 4),
    delays_s=(0.0, 0.005, 0.025, 0.1),
    rounds=5,
    max_tokens=64,
    prompts=5,
)
QUICK = Effort(shard_counts=(3,), delays_s=(0.0, 0.025), rounds=2, max_tokens=16, prompts=1)


def run(*, quick: bool, report: Callable[[Result], None]) -> None:
    """Measure rings of each length over links of each delay.

    Args:
        quick: Three shards only, fewer delays and tokens.
        report: Given each line.

    Raises:
        ModelError: The model cannot be found or loaded.
        ChildFailed: The backend did not come up.
        OSError: A shard ended.
        TooSlowError: A shard or a token did not come in time.
        KeyboardInterrupt: A signal came.
    """

    async def measure_all() -> None:
        await _measure_all(QUICK if quick else FULL, report)

    if trio.run(run_until_signal, measure_all):
        raise KeyboardInterrupt


async def _measure_all(effort: Effort, report: Callable[[Result], None]) -> None:
    for count in effort.shard_counts:
        if 0.0 in effort.delays_s:
            async with open_ring(count, None) as ring:
                await _measure_decode(ring, 0.0, effort, report)
        with open_emulator() as emulator:
            report(await _measure_emulator(emulator))
            async with open_ring(count, emulator) as ring:
                for delay_s in effort.delays_s:
                    if delay_s:
                        ring.shape(Conditions(delay_s=delay_s))
                        await _measure_decode(ring, delay_s, effort, report)
                ring.shape(LONG_LINK)
                await _measure_prefill(ring, effort, report)


async def _measure_emulator(emulator: LinkEmulator) -> Result:
    """Return how late its messages come; the rest of a hop's delay is Pals's."""
    subject = Subject(
        benchmark=NAME,
        system="link-emulator",
        setting={"delay_ms": 1000 * emulator_error.DELAY_S},
        load=os.getloadavg()[0],
    )
    errors_ms = await trio.to_thread.run_sync(emulator_error.measure_error_ms, emulator)
    return subject.summarise("delay_error_ms", "ms", errors_ms)


# --- the ring ------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Ring:
    """A running chain of shards and its driver.

    Attributes:
        client: The driver.
        shards: The shard processes, head first.
        links: One for each member, through which it is dialled; empty on loopback.
        subject: What the lines of the ring say of it.
        hidden_size: Of the model.
        prompts: For its sessions.
    """

    client: SessionClient
    shards: Sequence[ShardProcess]
    links: Sequence[EmulatedLink]
    subject: Subject
    hidden_size: int
    prompts: Prompts = field(default_factory=Prompts)

    def shape(self, conditions: Conditions) -> None:
        for link in self.links:
            link.shape(conditions)

    async def take_steps(self) -> list[ring_shard.Steps]:
        """Return the steps of each shard since the last call."""
        return [await shard.take_steps() for shard in self.shards]


class ShardProcess:
    """A running `benchmarks.ring_shard`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def process_id(self) -> int:
        return self._process.pid

    async def wait_until_ready(self) -> str:
        """Wait for the shard to be announced and return the kind of its device."""
        return msgspec.json.decode(await self._read_line(), type=ring_shard.Ready).device

    async def take_steps(self) -> ring_shard.Steps:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return msgspec.json.decode(await self._read_line(), type=ring_shard.Steps)

    async def _read_line(self) -> bytes:
        assert self._process.stdout is not None
        with trio.fail_after(START_DEADLINE_S):
            line = await trio.to_thread.run_sync(
                self._process.stdout.readline, abandon_on_cancel=True
            )
        if not line:
            raise BrokenPipeError(f"a shard ended with status {self._process.wait()}")
        return line


@asynccontextmanager
async def open_ring(
    count: int, emulator: LinkEmulator | None, limits: EngineLimits = LIMITS
) -> AsyncGenerator[Ring]:
    """Run ``count`` shards and a driver until the block ends.

    Args:
        count: Of shards; the cores are divided among them.
        emulator: Through which members are dialled; None for loopback alone.
        limits: Of each shard.
    """
    load = os.getloadavg()[0]
    model = config.load_settings(PRESET).demo.model
    snapshot = resolve_model(model)
    served = ServedModel(
        model_id=snapshot.model_id,
        manifest=snapshot.manifest,
        num_layers=snapshot.config.num_layers,
        max_position_embeddings=snapshot.config.max_position_embeddings,
        hidden_size=snapshot.config.hidden_size,
    )
    threads = max(1, (os.cpu_count() or 1) // count)
    layers = split_layers(served.num_layers, count)
    async with AsyncExitStack() as stack:
        profiles = await stack.enter_async_context(ring_members.open_membership(model, count))
        ports = [ring_members.free_port() for _ in profiles]
        links = [] if emulator is None else [emulator.add(port) for port in ports]
        announced = [link.port for link in links] or ports
        shards: list[ShardProcess] = []
        for profile, part, port, announced_port in zip(
            profiles[1:], layers, ports[1:], announced[1:], strict=True
        ):
            job = ring_shard.Job(
                profile=str(profile.path),
                model=model,
                layers=str(part),
                threads=threads,
                port=port,
                announced_port=announced_port,
                limits=limits,
            )
            shards.append(ShardProcess(stack.enter_context(_start_shard(job))))
        devices = [await shard.wait_until_ready() for shard in shards]
        options = ring_members.node_options(profiles[0], port=ports[0], announced_port=announced[0])
        client = await stack.enter_async_context(open_sessions(options, served))
        setting = {
            "model": model,
            "dtype": "bf16",
            "device": devices[0],
            "threads": threads,
            "sessions": 1,
            "shards": count,
        }
        yield Ring(
            client=client,
            shards=shards,
            links=links,
            subject=Subject(benchmark=NAME, system="pals", setting=setting, load=load),
            hidden_size=snapshot.config.hidden_size,
        )


def _start_shard(job: ring_shard.Job) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.ring_shard", msgspec.json.encode(job).decode()],
        env=config.child_environment({MALLOC_VARIABLE: HUGE_PAGES}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for this program, which ends it
    )


# --- one session ---------------------------------------------------------------------


async def _ask(ring: Ring, prompt_tokens: int, max_tokens: int) -> Answer:
    """Run one session to its end, with a prompt that no shard knows."""
    stream = await open_stream(ring.client, ring.prompts.draw(prompt_tokens), max_tokens)
    await stream.wait_for(max_tokens)
    return Answer(stream.arrivals_s)


# --- what is measured ----------------------------------------------------------------


async def _measure_decode(
    ring: Ring, delay_s: float, effort: Effort, report: Callable[[Result], None]
) -> None:
    await _ask(ring, DECODE_PROMPT_TOKENS, effort.max_tokens)
    await ring.take_steps()
    rounds: list[Round] = []
    for _ in range(effort.rounds):
        answer = await _ask(ring, DECODE_PROMPT_TOKENS, effort.max_tokens)
        rounds.append(Round.of(answer, await ring.take_steps()))
    hops = await ring.client.report()
    setting = {**ring.subject.setting, "delay_ms": 1000 * delay_s}
    crypto_ms = measure_cipher_ms(2 * ring.hidden_size)
    subject = replace(ring.subject, setting=setting)
    for result in (
        *summarise_decode(subject, rounds, delay_s),
        *summarise_parts(subject, hops, delay_s, crypto_ms),
    ):
        report(result)


async def _measure_prefill(ring: Ring, effort: Effort, report: Callable[[Result], None]) -> None:
    """Report the time to the first token of a long prompt over long links, and the ideal."""
    await _ask(ring, LONG_PROMPT_TOKENS, 1)
    await ring.take_steps()
    took_s: list[float] = []
    ideal_s: list[float] = []
    for _ in range(effort.prompts):
        answer = await _ask(ring, LONG_PROMPT_TOKENS, 1)
        took_s.append(answer.arrivals_s[0])
        compute_s = [steps.prefill_s for steps in await ring.take_steps()]
        ideal_s.append(_ideal_first_token_s(compute_s, ring.hidden_size))
    setting = {
        **ring.subject.setting,
        "delay_ms": 1000 * LONG_LINK.delay_s,
        "mbit_per_s": 8e-6 * LONG_LINK.bytes_per_s,
        "prompt_tokens": LONG_PROMPT_TOKENS,
    }
    subject = replace(ring.subject, setting=setting)
    report(subject.summarise("time_to_first_token_s", "s", took_s))
    report(subject.compare("time_to_first_token_ratio", took_s, ideal_s, to="ideal"))


def _ideal_first_token_s(compute_s: Sequence[Sequence[float]], hidden_size: int) -> float:
    """Return the ideal for the steps that ran: nothing but they, the bytes and the delays."""
    chunk_bytes = 2 * hidden_size * LIMITS.max_chunk_tokens
    makespan_s = ideal_makespan_s(
        compute_s, [chunk_bytes] * len(compute_s[0]), bytes_per_s=LONG_LINK.bytes_per_s
    )
    return makespan_s + (len(compute_s) + 1) * LONG_LINK.delay_s
