"""Answers under a grammar over a real chain: what comes is of the grammar, whatever happens."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest
import trio

from pals.driver.sessions import SessionClient
from pals.driver.state import SessionEvent, SessionRequest
from pals.errors import InvalidGrammar
from pals.text.grammar import GrammarMasks
from pals.types import EngineLimits, Grammar, Sampling
from tests.checkpoints import EOS_ID
from tests.integration.swarm import (
    DEADLINE_S,
    Answer,
    RunningShard,
    ask,
    make_swarm,
    open_client,
    request,
    start_chain,
)

pytestmark = [pytest.mark.trio, pytest.mark.timeout(180)]

PROMPT = [5, 9, 200, 31]
ROOMY = EngineLimits(
    max_sessions=8, max_rows=8, max_context_tokens=192, max_chunk_tokens=16, verify_tokens=1
)
SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "string", "minLength": 1, "maxLength": 3},
        "size": {"type": "integer", "minimum": 0, "maximum": 250},
        "c": {"enum": ["red", "green"]},
        "p": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["n", "size", "c", "p"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_pattern": " ?"},
}
GRAMMAR = Grammar(kind="json_schema", source=json.dumps(SCHEMA))


class Thing(msgspec.Struct, forbid_unknown_fields=True):
    """What `SCHEMA` allows."""

    n: Annotated[str, msgspec.Meta(min_length=1, max_length=3)]
    size: Annotated[int, msgspec.Meta(ge=0, le=250)]
    c: Literal["red", "green"]
    p: Annotated[list[bool], msgspec.Meta(min_length=1, max_length=2)]


def guided(grammar: Grammar = GRAMMAR, count: int = 90, **sampling: object) -> SessionRequest:
    asked = request(PROMPT, count=count, **sampling)
    return replace(asked, grammar=grammar, stop_token_ids=(EOS_ID,))


def read(tokens: Sequence[int]) -> Thing:
    """Return what an answer says, which ends where its grammar does."""
    assert tokens[-1] == EOS_ID
    return msgspec.json.decode(bytes(tokens[:-1]), type=Thing)


async def fork(client: SessionClient, parent: Answer, **sampling: object) -> Answer:
    send, receive = trio.open_memory_channel[SessionEvent](1000)
    with trio.fail_after(DEADLINE_S):
        session = await client.fork(parent.session, Sampling(**sampling), send.send_nowait)
    return Answer(client, receive, session)


async def answer_to(client: SessionClient, asked: SessionRequest) -> list[int]:
    return await (await ask(client, asked)).all_tokens()


async def test_every_answer_is_of_its_schema_and_so_is_every_fork_of_it(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    async with make_swarm(tmp_path) as swarm:
        await start_chain(nursery, swarm, "0:2", "2:5", "5:6")
        async with open_client(swarm) as client:
            alone = await answer_to(client, request(PROMPT))
            greedy, free = await ask(client, guided()), await ask(client, request(PROMPT))
            answers = [await greedy.all_tokens()]
            beside = await free.all_tokens()
            for seed in (1, 3):
                parent = await ask(client, guided(temperature=1.0, seed=seed))
                await parent.next_token()
                child = await fork(client, parent, temperature=1.0, seed=seed + 1)
                answers += [await parent.all_tokens(), await child.all_tokens()]
        nursery.cancel_scope.cancel()

    assert len({str(read(tokens)) for tokens in answers}) == 5
    assert beside == alone


# --- whatever happens ----------------------------------------------------------------


UNSUPPORTED = '{"type": "array", "uniqueItems": true}'
LONG = Grammar(kind="json_schema", source='{"type": "string", "pattern": "^[a-z]{140}$"}')


@pytest.mark.slow
async def test_a_grammar_goes_on_at_its_place_on_another_chain(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    asked = guided(LONG, 150, temperature=1.0, seed=3)
    async with make_swarm(tmp_path, count=4) as made:
        swarm = replace(made, limits=ROOMY)
        shards = await start_chain(nursery, swarm, "0:2", "2:5", "5:6", "5:6")
        async with open_client(swarm, wait_for_peers_s=30.0) as client:
            whole = await answer_to(client, asked)
            answer = await ask(client, asked)
            for _ in range(20):
                await answer.next_token()
            tail = answer.session.chain.tail.peer
            (lost,) = [shard for shard in shards if shard.node.peer_id == tail]
            lost.scope.cancel()
            moved = await answer.all_tokens()
            assert answer.session.chain.tail.peer != tail
        nursery.cancel_scope.cancel()

    assert len(json.loads(bytes(whole[:-1]))) == 140
    assert moved == whole


@pytest.mark.slow
async def test_a_grammar_goes_on_at_its_place_after_a_preemption(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    page_bytes = 3 * 64 * 2 * 2 * 16 * 4  # of the shard of three layers
    limits = replace(ROOMY, kv_bytes=4 * page_bytes)
    asked = [guided(LONG, 150, temperature=1.0, seed=seed) for seed in (1, 2)]
    async with make_swarm(tmp_path) as made:
        swarm = replace(made, limits=limits)
        await start_chain(nursery, swarm, "0:2", "2:5", "5:6")
        async with open_client(swarm) as client:
            alone = [await answer_to(client, one) for one in asked]
            answers = [await ask(client, one) for one in asked]
            first = {answer.session.attempt.session for answer in answers}
            together = [await answer.all_tokens() for answer in answers]
            last = {answer.session.attempt.session for answer in answers}
        nursery.cancel_scope.cancel()

    assert first != last, "nobody was preempted"
    assert together == alone
    assert all(len(json.loads(bytes(tokens[:-1]))) == 140 for tokens in together)


def masks_of(shard: RunningShard) -> GrammarMasks:
    assert isinstance(shard.shard.masks, GrammarMasks)
    return shard.shard.masks


def kill_child(masks: GrammarMasks) -> None:
    process = masks._child._process
    assert process is not None
    call = process.stop.peek()
    assert call is not None
    os.kill(call[2][0].pid, signal.SIGKILL)


HOSTILE = [
    Grammar(
        kind="json_schema",
        source=json.dumps({"properties": {f"p{i}": {"type": "string"} for i in range(2000)}}),
    ),
    Grammar(kind="json_schema", source='{"type": "string", "pattern": "^(.{1,999}x){1,999}$"}'),
    Grammar(kind="lark", source='start: (("x"{0,1000}){0,1000}){0,1000}'),
    Grammar(kind="json_schema", source='{"$ref": "#"}'),
]


@pytest.mark.slow
async def test_nobody_else_notices_when_the_process_of_the_grammars_dies(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    asked = [guided(LONG, 150, temperature=1.0, seed=seed) for seed in (1, 2)]
    async with make_swarm(tmp_path) as made:
        swarm = replace(made, limits=ROOMY)
        (shard,) = await start_chain(nursery, swarm, "0:6")
        async with open_client(swarm) as client:
            whole = [await answer_to(client, one) for one in asked]
            answers = [await ask(client, one) for one in asked]
            for answer in answers:
                await answer.next_token()
            kill_child(masks_of(shard))
            tokens = [await answer.all_tokens() for answer in answers]
        nursery.cancel_scope.cancel()

    assert tokens == whole


@pytest.mark.slow
async def test_a_hostile_grammar_ends_alone(tmp_path: Path, nursery: trio.Nursery) -> None:
    async with make_swarm(tmp_path) as made:
        swarm = replace(made, limits=ROOMY)
        await start_chain(nursery, swarm, "0:6")
        async with open_client(swarm) as client:
            honest = await ask(client, guided(temperature=1.0, seed=1))
            free = await ask(client, request(PROMPT, count=100))
            for grammar in HOSTILE:
                with suppress(InvalidGrammar):
                    await answer_to(client, guided(grammar, temperature=1.0, seed=2))
            tokens, unguided = await honest.all_tokens(), await free.all_tokens()
            with pytest.raises(InvalidGrammar, match="uniqueItems"):
                await answer_to(client, guided(Grammar(kind="json_schema", source=UNSUPPORTED)))
        nursery.cancel_scope.cancel()

    assert read(tokens)
    assert len(unguided) == 100
