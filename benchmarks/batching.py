"""Many sessions through three shards on loopback, one thread each, with the demo's model.

How many tokens come in all with more and more sessions; what a long prompt does to those
who decode; and what a prompt costs that the shards know already. llama.cpp splits a model of
the same shape over three RPC servers with as many threads, and takes turns with Pals.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import trio

from benchmarks.llama_cpp import LlamaCpp, find_llama_cpp
from benchmarks.random_models import SMOLLM2_135M, open_gguf
from benchmarks.results import Result, Subject
from benchmarks.ring import Ring, open_ring
from benchmarks.streams import Stream, open_stream, open_streams
from pals.cli.interrupt import run_until_signal
from pals.types import EngineLimits

NAME = "batching"
SHARDS = 3
LLAMA_CPP_RPC = "llama.cpp RPC"
SHORT_PROMPT = 32
OTHERS = 4
LONG_ANSWER = 2048
LIMITS = EngineLimits(max_sessions=64, max_context_tokens=8192, kv_bytes=512 << 20)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What to measure and how long.

    Attributes:
        sessions: At a time.
        window_s: In which tokens are counted.
        rounds: Samples of each cell.
        long_prompt: Tokens of the prompt that comes while others decode.
        repeated_prompt: Tokens of the prompt that comes twice.
    """

    sessions: tuple[int, ...]
    window_s: float
    rounds: int
    long_prompt: int
    repeated_prompt: int


FULL = Effort(
    sessions=(1, 4, 8, 16, 64), window_s=3.0, rounds=5, long_prompt=4096, repeated_prompt=2048
)
QUICK = Effort(sessions=(1, 4), window_s=1.0, rounds=2, long_prompt=512, repeated_prompt=512)


@dataclass(slots=True)
class Samples:
    """What all rounds brought.

    Attributes:
        totals: Tokens per second of Pals, by sessions at a time; one of each round.
        rival_totals: The same of llama.cpp; empty without it.
        rates_before: Tokens per second of the others before the long prompt.
        rates_beside: And while it was read.
        alone_s: Until the first token of a long prompt that has the shards for itself.
        beside_s: And of the one that comes while others decode.
        first_s: Until the first token of a prompt.
        again_s: And of the same prompt once more.
    """

    totals: dict[int, list[float]] = field(default_factory=dict[int, list[float]])
    rival_totals: dict[int, list[float]] = field(default_factory=dict[int, list[float]])
    rates_before: list[float] = field(default_factory=list[float])
    rates_beside: list[float] = field(default_factory=list[float])
    alone_s: list[float] = field(default_factory=list[float])
    beside_s: list[float] = field(default_factory=list[float])
    first_s: list[float] = field(default_factory=list[float])
    again_s: list[float] = field(default_factory=list[float])


def run(*, quick: bool, report: Callable[[Result], None]) -> None:
    """Measure three shards, and llama.cpp's where it is built.

    Args:
        quick: Fewer sessions and tokens.
        report: Given each line.

    Raises:
        ModelError: The model cannot be found or loaded.
        PalsError: A session was not taken, or ended.
        OSError: A shard ended.
        CalledProcessError: llama.cpp failed.
        TooSlowError: A shard or a token did not come in time.
        KeyboardInterrupt: A signal came.
    """
    effort = QUICK if quick else FULL

    async def measure_all() -> None:
        with ExitStack() as stack:
            rival = open_rival(stack, effort)
            async with open_ring(SHARDS, None, LIMITS) as ring:
                samples = await measure(ring, rival, effort)
                subject = replace(ring.subject, benchmark=NAME)
        for result in summarise(subject, samples, effort):
            report(result)

    if trio.run(run_until_signal, measure_all):
        raise KeyboardInterrupt


Rival = Callable[[], Mapping[int, float]]
"""Runs llama.cpp once and returns its tokens per second by sessions."""


def open_rival(stack: ExitStack, effort: Effort) -> Rival | None:
    """Start llama.cpp's RPC servers, where it is built."""
    llama_cpp: LlamaCpp | None = find_llama_cpp(max(1, (os.cpu_count() or 1) // SHARDS))
    if llama_cpp is None:
        return None
    servers = stack.enter_context(llama_cpp.open_servers(SHARDS))
    return partial(
        llama_cpp.decode_rates,
        open_gguf(SMOLLM2_135M, "BF16"),
        rows=effort.sessions,
        prompt_tokens=SHORT_PROMPT,
        steps=SHORT_PROMPT,
        servers=servers,
    )


# --- what is measured ----------------------------------------------------------------


async def measure(ring: Ring, rival: Rival | None, effort: Effort) -> Samples:
    """Run all rounds; one session before them warms the shards up."""
    samples = Samples()
    await first_token_s(ring, ring.prompts.draw(SHORT_PROMPT))
    for _ in range(effort.rounds):
        for count in effort.sessions:
            rate = await count_tokens(ring, count, effort.window_s)
            samples.totals.setdefault(count, []).append(rate)
        if rival is not None:
            rates = await trio.to_thread.run_sync(rival, abandon_on_cancel=True)
            for count in effort.sessions:
                samples.rival_totals.setdefault(count, []).append(rates[count])
        await measure_long_prompt(ring, effort, samples)
        await measure_repeated_prompt(ring, effort, samples)
    return samples


async def count_tokens(ring: Ring, count: int, window_s: float) -> float:
    """Return the tokens per second of ``count`` sessions, once all of them decode."""
    wanted = [ring.prompts.draw(SHORT_PROMPT) for _ in range(count)]
    streams = await open_streams(ring.client, wanted, LONG_ANSWER)
    rate = await rate_of(streams, window_s)
    for stream in streams:
        stream.close()
    return rate


async def rate_of(streams: Sequence[Stream], window_s: float) -> float:
    """Return the tokens per second of sessions from now on."""
    before, started_s = _tokens_of(streams), time.perf_counter()
    await trio.sleep(window_s)
    return (_tokens_of(streams) - before) / (time.perf_counter() - started_s)


async def measure_long_prompt(ring: Ring, effort: Effort, samples: Samples) -> None:
    """Read a long prompt alone, and another one while others decode."""
    samples.alone_s.append(await first_token_s(ring, ring.prompts.draw(effort.long_prompt)))
    wanted = [ring.prompts.draw(SHORT_PROMPT) for _ in range(OTHERS)]
    others = await open_streams(ring.client, wanted, LONG_ANSWER)
    samples.rates_before.append(await rate_of(others, effort.window_s))
    before, started_s = _tokens_of(others), time.perf_counter()
    samples.beside_s.append(await first_token_s(ring, ring.prompts.draw(effort.long_prompt)))
    came, took_s = _tokens_of(others) - before, time.perf_counter() - started_s
    samples.rates_beside.append(came / took_s)
    for other in others:
        other.close()


async def measure_repeated_prompt(ring: Ring, effort: Effort, samples: Samples) -> None:
    """Ask the same twice."""
    prompt = ring.prompts.draw(effort.repeated_prompt)
    samples.first_s.append(await first_token_s(ring, prompt))
    samples.again_s.append(await first_token_s(ring, prompt))


async def first_token_s(ring: Ring, prompt: Sequence[int]) -> float:
    """Return how long the first token of a prompt takes; there is no second one."""
    started_s = time.perf_counter()
    stream = await open_stream(ring.client, prompt, 1)
    await stream.wait_for(1)
    return time.perf_counter() - started_s


def _tokens_of(streams: Sequence[Stream]) -> int:
    return sum(len(stream.arrivals_s) for stream in streams)


# --- the lines -----------------------------------------------------------------------


def summarise(subject: Subject, samples: Samples, effort: Effort) -> Iterator[Result]:
    """Yield the lines of three shards, and of llama.cpp's servers."""
    for count, own in samples.totals.items():
        of = replace(subject, setting={**subject.setting, "sessions": count})
        yield of.summarise("total_tokens_per_s", "tokens/s", own)
        if count > 1:
            yield of.compare("total_tokens_ratio", own, samples.totals[1], to="1 session")
        if others := samples.rival_totals.get(count):
            rival = replace(of, system=LLAMA_CPP_RPC)
            yield rival.summarise("total_tokens_per_s", "tokens/s", others)
            yield of.compare("total_tokens_ratio", own, others, to=LLAMA_CPP_RPC)
    yield from _summarise_long_prompt(subject, samples, effort.long_prompt)
    yield from _summarise_repeated_prompt(subject, samples, effort.repeated_prompt)


def _summarise_long_prompt(subject: Subject, samples: Samples, tokens: int) -> Iterator[Result]:
    setting = {**subject.setting, "prompt_tokens": tokens}
    alone = replace(subject, setting={**setting, "sessions": 1})
    yield alone.summarise("time_to_first_token_s", "s", samples.alone_s)
    beside = replace(subject, setting={**setting, "sessions": 1 + OTHERS})
    yield beside.summarise("time_to_first_token_s", "s", samples.beside_s)
    yield beside.compare(
        "decode_ratio", samples.rates_beside, samples.rates_before, to="before the prompt"
    )


def _summarise_repeated_prompt(subject: Subject, samples: Samples, tokens: int) -> Iterator[Result]:
    of = replace(subject, setting={**subject.setting, "sessions": 1, "prompt_tokens": tokens})
    yield of.summarise("time_to_first_token_s", "s", samples.first_s)
    yield of.compare(
        "time_to_first_token_ratio", samples.again_s, samples.first_s, to="the first time"
    )
