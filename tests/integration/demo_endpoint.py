"""The endpoint over the demo model, split over three real shards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import trio

from pals import config
from pals.driver.bridge import TrioThread
from pals.driver.local import LocalDriver
from pals.driver.routes import ServedModel
from pals.driver.sessions import SessionClient, open_sessions
from pals.models.gguf import DEMO_MODEL_ID
from pals.models.snapshot import Snapshot
from pals.text.grammar import GrammarChecker, GrammarMasks
from pals.text.template import ChatTemplate
from pals.text.tokenizer import Tokenizer
from pals.types import EngineLimits
from tests.as_shipped import compile_as_shipped
from tests.demo_model import import_demo_model
from tests.integration.api.servers import running
from tests.integration.swarm import make_swarm, served_model, start_chain

LIMITS = EngineLimits(
    max_sessions=2, max_rows=2, max_context_tokens=512, max_chunk_tokens=16, verify_tokens=1
)
SPLIT = ("0:10", "10:20", "20:30")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A driver of the model, whose shards all run."""

    sessions: SessionClient
    model: ServedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A chain on its network thread, and the endpoint over it."""

    network: TrioThread[Chain]
    chain: Chain
    tokenizer: Tokenizer
    url: str

    def steps(self) -> int:
        """Return how many decode steps the head has made so far."""
        hops = asyncio.run(self.network.call(self.chain.sessions.report))
        return hops[0].steps if hops else 0


@contextmanager
def demo_endpoint(folder: Path, cache: Path, limits: EngineLimits = LIMITS) -> Iterator[World]:
    """Serve the demo model; ``cache`` keeps it and its compiled programs."""
    checkpoint = import_demo_model(cache)
    network = TrioThread(partial(_open_chain, folder, checkpoint, limits))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(config.CACHE_DIR_VARIABLE, str(cache))
        # For a model of this size the steps outweigh what it takes to optimise them.
        compile_as_shipped(patch)
        chain = network.start()
    try:
        tokenizer = Tokenizer.load(checkpoint)
        with running(_driver(network, chain, tokenizer, checkpoint)) as url:
            yield World(network=network, chain=chain, tokenizer=tokenizer, url=url)
    finally:
        network.stop()


@asynccontextmanager
async def _open_chain(folder: Path, checkpoint: Path, limits: EngineLimits) -> AsyncIterator[Chain]:
    async with make_swarm(folder) as tiny, trio.open_nursery() as nursery:
        swarm = replace(tiny, checkpoint=checkpoint, limits=limits)
        await start_chain(nursery, swarm, *SPLIT)
        model = replace(served_model(swarm), model_id=DEMO_MODEL_ID)
        async with open_sessions(swarm.options(swarm.operator), model) as sessions:
            yield Chain(sessions=sessions, model=model)
        nursery.cancel_scope.cancel()


def _driver(
    network: TrioThread[Chain], chain: Chain, tokenizer: Tokenizer, checkpoint: Path
) -> LocalDriver:
    vocab_size = Snapshot.open(checkpoint, str(checkpoint)).config.vocab_size
    masks = GrammarMasks(checkpoint / "tokenizer.json", vocab_size, tokenizer.eos_token_ids)
    return LocalDriver(
        network,
        chain.sessions,
        chain.model,
        tokenizer,
        ChatTemplate.load(checkpoint),
        eos_token_ids=tokenizer.eos_token_ids,
        vocab_size=vocab_size,
        grammars=GrammarChecker(masks),
    )
