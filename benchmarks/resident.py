"""Whether a shard's memory grows with the sessions that it has served.

Three shards on loopback with the demo's model serve session after session, some at a time.
Resident memory is read from Linux's /proc.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import trio

from benchmarks.batching import LIMITS, SHARDS
from benchmarks.load_child import read_memory
from benchmarks.results import Result, Subject
from benchmarks.ring import Ring, open_ring
from benchmarks.streams import open_streams
from pals.cli.interrupt import run_until_signal

NAME = "resident"
SESSIONS = 10_000
QUICK_SESSIONS = 400
AT_A_TIME = 40
READINGS = 10
PROMPT_TOKENS = 16
ANSWER_TOKENS = 2


def run(*, quick: bool, report: Callable[[Result], None]) -> None:
    """Serve many sessions and report the memory of each shard on the way.

    Args:
        quick: Fewer sessions.
        report: Given each line.

    Raises:
        ModelError: The model cannot be found or loaded.
        PalsError: A session was not taken, or ended.
        OSError: A shard ended.
        KeyboardInterrupt: A signal came.
    """
    sessions = QUICK_SESSIONS if quick else SESSIONS

    async def measure_all() -> None:
        async with open_ring(SHARDS, None, LIMITS) as ring:
            readings = await serve_sessions(ring, sessions)
            setting = {**ring.subject.setting, "sessions": sessions, "at_a_time": AT_A_TIME}
            subject = replace(ring.subject, benchmark=NAME, setting=setting)
        for result in summarise(subject, readings):
            report(result)

    if trio.run(run_until_signal, measure_all):
        raise KeyboardInterrupt


async def serve_sessions(ring: Ring, sessions: int) -> list[list[int]]:
    """Return the resident bytes of each shard after each tenth of the sessions."""
    readings: list[list[int]] = []
    for number in range(sessions // AT_A_TIME):
        wanted = [ring.prompts.draw(PROMPT_TOKENS) for _ in range(AT_A_TIME)]
        for stream in await open_streams(ring.client, wanted, ANSWER_TOKENS):
            await stream.wait_for(ANSWER_TOKENS)
        if (number + 1) % (sessions // AT_A_TIME // READINGS) == 0:
            await ring.take_steps()  # else the shards would hold what they note of each
            readings.append([read_memory("VmRSS", s.process_id) for s in ring.shards])
    return readings


def summarise(subject: Subject, readings: Sequence[Sequence[int]]) -> Iterator[Result]:
    """Yield the memory of the shards, and the last reading of each by its first."""
    for number, of_shard in enumerate(zip(*readings, strict=True)):
        of = replace(subject, setting={**subject.setting, "shard": number})
        yield of.summarise("resident_bytes", "bytes", of_shard)
    yield subject.compare(
        "resident_memory_ratio", readings[-1], readings[0], to=f"after 1 of {len(readings)} parts"
    )
