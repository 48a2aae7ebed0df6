"""Many readers at a time of a model over three shards."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
from openai import AsyncOpenAI

from pals.models.gguf import DEMO_MODEL_ID
from pals.types import EngineLimits
from tests.demo_model import load_goldens
from tests.integration.demo_endpoint import World, demo_endpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STREAMS = 64
LIMITS = EngineLimits(
    max_sessions=STREAMS,
    max_rows=STREAMS,
    max_context_tokens=512,
    max_chunk_tokens=64,
    verify_tokens=1,
)
GOLDENS = load_goldens()["prompts"]
NEW_TOKENS = 48
DEADLINE_S = 500.0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Iterator[World]:
    with demo_endpoint(tmp_path_factory.mktemp("load"), shared_cache, LIMITS) as made:
        yield made


def test_as_many_streams_as_there_is_room_for_are_right_and_none_waits_for_the_others(
    world: World,
) -> None:
    asked = [GOLDENS[number % len(GOLDENS)] for number in range(STREAMS)]
    arrivals: list[int] = []
    """Which stream each part of a text was of, in the order in which they came."""

    async def read(client: AsyncOpenAI, number: int) -> str:
        chunks = await client.chat.completions.create(
            model=DEMO_MODEL_ID,
            messages=asked[number]["messages"],
            max_tokens=NEW_TOKENS,
            temperature=0,
            stream=True,
        )
        pieces: list[str] = []
        async for chunk in chunks:
            pieces.append(chunk.choices[0].delta.content or "")
            arrivals.append(number)
        return "".join(pieces)

    async def read_all() -> list[str]:
        url = f"{world.url}/v1"
        async with AsyncOpenAI(
            base_url=url, api_key="unused", max_retries=0, timeout=DEADLINE_S
        ) as client:
            return await asyncio.gather(*(read(client, number) for number in range(STREAMS)))

    texts = asyncio.run(read_all())

    assert texts == [golden["text"] for golden in asked]
    waits = first_waits(arrivals)
    assert max(waits) <= 3 * median(waits)


def first_waits(arrivals: list[int]) -> list[float]:
    """Return how long each stream waited for its first part, whatever else this machine does.

    Counted in turns of those that have begun: each part is one of as many as are under way.
    """
    last = {number: place for place, number in enumerate(arrivals)}
    waits: dict[int, float] = {}
    turns, ended = 0.0, 0
    for place, number in enumerate(arrivals):
        waits.setdefault(number, turns)
        turns += 1 / (len(waits) - ended)
        ended += place == last[number]
    return list(waits.values())
