"""The real model over three shards and the network, as OpenAI's own client sees it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from openai import APITimeoutError, BadRequestError, OpenAI, Stream
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from pals.models.gguf import DEMO_MODEL_ID
from tests.demo_model import load_goldens
from tests.integration.demo_endpoint import LIMITS, SPLIT, World, demo_endpoint
from tests.integration.swarm import ask, request

pytestmark = pytest.mark.timeout(180)

GOLDENS = load_goldens()["prompts"]
PARIS, EMOJI, _, _, STORY = GOLDENS
NEW_TOKENS = 48
FEW_TOKENS = 8
MANY_TOKENS = 400
DEADLINE_S = 60.0
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Iterator[World]:
    with demo_endpoint(tmp_path_factory.mktemp("endpoint"), shared_cache) as made:
        yield made


@pytest.fixture
def client(world: World) -> Iterator[OpenAI]:
    with OpenAI(
        base_url=f"{world.url}/v1", api_key="unused", max_retries=0, timeout=DEADLINE_S
    ) as made:
        yield made


def complete(client: OpenAI, golden: dict, **options: object) -> ChatCompletion:
    values = {"max_tokens": NEW_TOKENS, "temperature": 0} | options
    return client.chat.completions.create(
        model=DEMO_MODEL_ID, messages=golden["messages"], **values
    )


def stream(client: OpenAI, golden: dict, **options: object) -> Stream[ChatCompletionChunk]:
    return complete(client, golden, stream=True, stream_options={"include_usage": True}, **options)


def pieces(chunks: Stream[ChatCompletionChunk]) -> tuple[list[str], str, tuple[int, int]]:
    """Return the texts, the finish reason, and the tokens of prompt and answer."""
    with chunks:
        *deltas, usage = chunks
    texts = [c.choices[0].delta.content for c in deltas if c.choices[0].delta.content]
    reasons = [c.choices[0].finish_reason for c in deltas if c.choices[0].finish_reason]
    assert len(reasons) == 1
    assert usage.choices == []
    return texts, reasons[0], (usage.usage.prompt_tokens, usage.usage.completion_tokens)


@contextmanager
def open_streams(client: OpenAI, count: int) -> Iterator[None]:
    """Hold ``count`` long answers open, each past its first token."""
    opened = [stream(client, STORY, max_tokens=MANY_TOKENS) for _ in range(count)]
    try:
        for chunks in opened:
            next(iter(chunks))
        yield
    finally:
        for chunks in opened:
            chunks.close()


# --- the tokens ----------------------------------------------------------------------


@pytest.mark.parametrize("golden", GOLDENS, ids=[g["text"][:12] for g in GOLDENS])
def test_the_network_gives_the_token_ids_of_the_reference(world: World, golden: dict) -> None:
    async def all_tokens() -> list[int]:
        wanted = request(golden["prompt_ids"], NEW_TOKENS)
        stops = tuple(world.tokenizer.eos_token_ids)
        answer = await ask(world.chain.sessions, replace(wanted, stop_token_ids=stops))
        return await answer.all_tokens()

    assert asyncio.run(world.network.call(all_tokens)) == golden["token_ids"]


# --- the client ----------------------------------------------------------------------


@pytest.mark.parametrize("golden", GOLDENS, ids=[g["text"][:12] for g in GOLDENS])
def test_whole_and_streamed_answers_are_the_reference_s(client: OpenAI, golden: dict) -> None:
    with ThreadPoolExecutor() as pool:  # both at the same time, on both slots
        whole_answer = pool.submit(complete, client, golden)
        texts, reason, usage = pieces(stream(client, golden))
        whole = whole_answer.result()

    counts = (len(golden["prompt_ids"]), len(golden["token_ids"]))
    assert whole.choices[0].message.content == "".join(texts) == golden["text"]
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == usage == counts
    assert whole.choices[0].finish_reason == reason
    assert reason == ("length" if counts[1] == NEW_TOKENS else "stop")


def test_an_emoji_of_several_tokens_is_streamed_in_one_piece(world: World, client: OpenAI) -> None:
    ids = EMOJI["token_ids"]
    whole = max(
        n for n in range(len(ids)) if not world.tokenizer.decode(ids[:n]).endswith(REPLACEMENT)
    )

    texts, _, _ = pieces(stream(client, EMOJI, max_tokens=whole))

    assert "".join(texts) == world.tokenizer.decode(ids[:whole])
    assert sum("\N{PARTY POPPER}" in text for text in texts) > 1
    assert not any(REPLACEMENT in text for text in texts)
    assert len(texts) < whole, "no character had several tokens: this proves nothing"


@pytest.mark.parametrize("stop", [["France"], [" of Fra", "never"], ["Paris", "capital of Fr"]])
def test_the_text_ends_before_the_first_stop_string(client: OpenAI, stop: list[str]) -> None:
    expected = min((PARIS["text"].partition(s)[0] for s in stop), key=len)

    whole = complete(client, PARIS, stop=stop)
    texts, reason, _ = pieces(stream(client, PARIS, stop=stop))

    assert whole.choices[0].message.content == "".join(texts) == expected
    assert whole.choices[0].finish_reason == reason == "stop"


def test_max_tokens_cuts_the_answer_and_says_so(world: World, client: OpenAI) -> None:
    whole = complete(client, PARIS, max_tokens=5)

    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 5
    assert whole.choices[0].message.content == world.tokenizer.decode(PARIS["token_ids"][:5])


def test_a_seed_repeats_an_answer_and_another_gives_another(client: OpenAI) -> None:
    drawn = [
        complete(client, STORY, temperature=1.2, seed=seed, max_tokens=24) for seed in (7, 7, 8)
    ]
    texts = [answer.choices[0].message.content for answer in drawn]

    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("messages", "max_tokens"),
    [(PARIS["messages"], 600), ([{"role": "user", "content": "word " * 600}], 1)],
    ids=["long answer", "long prompt"],
)
def test_what_exceeds_the_context_is_refused_with_openai_s_code(
    world: World, client: OpenAI, messages: list[dict], max_tokens: int, streamed: bool
) -> None:
    steps = world.steps()
    with pytest.raises(BadRequestError) as caught:
        complete(client, {"messages": messages}, max_tokens=max_tokens, stream=streamed)

    assert caught.value.code == "context_length_exceeded"
    assert str(LIMITS.max_context_tokens) in caught.value.message
    assert world.steps() == steps


# --- what else a request may ask for -------------------------------------------------


def test_token_ids_of_a_prompt_are_completed_as_the_conversation_is(
    world: World, client: OpenAI
) -> None:
    answer = client.completions.create(
        model=DEMO_MODEL_ID, prompt=PARIS["prompt_ids"], max_tokens=FEW_TOKENS, temperature=0
    )

    assert answer.choices[0].text == world.tokenizer.decode(PARIS["token_ids"][:FEW_TOKENS])


def test_several_answers_share_a_prompt_and_are_drawn_apart(world: World, client: OpenAI) -> None:
    greedy = complete(client, PARIS, n=2, max_tokens=FEW_TOKENS)
    drawn = complete(client, STORY, n=2, temperature=1.2, seed=7, max_tokens=FEW_TOKENS)
    alone = complete(client, STORY, temperature=1.2, seed=8, max_tokens=FEW_TOKENS)

    text = world.tokenizer.decode(PARIS["token_ids"][:FEW_TOKENS])
    assert [choice.message.content for choice in greedy.choices] == [text] * 2
    assert greedy.usage.completion_tokens == 2 * FEW_TOKENS
    first, second = [choice.message.content for choice in drawn.choices]
    assert first != second
    assert second == alone.choices[0].message.content


def test_scores_have_the_bytes_of_the_text_and_the_likeliest_tokens(
    world: World, client: OpenAI
) -> None:
    [choice] = complete(client, EMOJI, logprobs=True, top_logprobs=3, max_tokens=FEW_TOKENS).choices

    text = world.tokenizer.decode(EMOJI["token_ids"][:FEW_TOKENS])
    scores = choice.logprobs.content
    joined = b"".join(bytes(score.bytes) for score in scores)
    assert joined.decode(errors="replace") == choice.message.content == text
    assert all(score.top_logprobs[0].token == score.token for score in scores)
    assert all(len(score.top_logprobs) == 3 for score in scores)
    assert all(score.logprob == score.top_logprobs[0].logprob <= 0 for score in scores)


def test_scores_in_a_stream_are_those_of_the_whole_answer(client: OpenAI) -> None:
    options = {"logprobs": True, "max_tokens": FEW_TOKENS}
    whole = complete(client, EMOJI, **options).choices[0].logprobs.content
    with stream(client, EMOJI, **options) as chunks:
        parts = [c.choices[0].logprobs for c in chunks if c.choices]

    assert [score for part in parts if part for score in part.content] == whole


def test_a_bias_bans_a_token(world: World, client: OpenAI) -> None:
    banned = PARIS["token_ids"][0]

    answer = complete(client, PARIS, logit_bias={str(banned): -100}, logprobs=True, max_tokens=4)

    tokens = [bytes(score.bytes) for score in answer.choices[0].logprobs.content]
    assert world.tokenizer.shown_bytes(banned) not in tokens


def test_embeddings_are_unit_vectors_that_repeat(world: World, client: OpenAI) -> None:
    inputs = ["a prompt of some words", "something else", "a prompt of some words"]

    answer = client.embeddings.create(model=DEMO_MODEL_ID, input=inputs)

    first, other, again = [np.array(data.embedding) for data in answer.data]
    assert first.shape == (world.chain.model.hidden_size,)
    assert np.linalg.norm(first) == pytest.approx(1, abs=1e-5)
    assert first == pytest.approx(again, abs=1e-3)
    assert float(first @ other) < 0.999


def test_an_echoed_prompt_is_scored_as_the_model_scores_its_own_words(
    world: World, client: OpenAI
) -> None:
    prompt = PARIS["prompt_ids"][-6:]
    made = client.completions.create(
        model=DEMO_MODEL_ID, prompt=prompt, max_tokens=4, temperature=0, logprobs=1
    ).choices[0]
    ids = [*prompt, *world.tokenizer.encode(made.text, add_special_tokens=False)]

    echoed = client.completions.create(
        model=DEMO_MODEL_ID, prompt=ids, max_tokens=0, echo=True, logprobs=1
    ).choices[0]

    assert echoed.text == world.tokenizer.decode(ids)
    assert echoed.logprobs.token_logprobs[0] is None
    assert echoed.logprobs.token_logprobs[-4:] == pytest.approx(
        made.logprobs.token_logprobs, abs=0.05
    )
    assert echoed.logprobs.tokens[-4:] == made.logprobs.tokens


class City(BaseModel):
    name: Literal["Paris", "Rome"]
    capital: bool


def test_an_answer_has_the_form_that_the_request_gives(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=DEMO_MODEL_ID,
        messages=PARIS["messages"],
        response_format=City,
        max_tokens=40,
        temperature=0,
    )

    assert isinstance(answer.choices[0].message.parsed, City)


def test_a_form_that_cannot_be_enforced_is_refused_by_name(client: OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}

    with pytest.raises(BadRequestError) as caught:
        complete(client, PARIS, response_format=form)

    assert (caught.value.code, caught.value.param) == ("invalid_grammar", "response_format")


def test_a_tool_that_has_to_be_called_is_called(client: OpenAI) -> None:
    parameters = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}

    [choice] = complete(client, PARIS, tools=[tool], tool_choice="required").choices

    assert choice.finish_reason == "tool_calls"
    function = choice.message.tool_calls[0].function
    assert function.name == "weather"
    assert json.loads(function.arguments)["city"] in ("Paris", "Rome")


def test_headers_name_the_shards_of_the_route(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=DEMO_MODEL_ID, messages=PARIS["messages"], max_tokens=2
    )

    route = raw.headers["x-pals-route"].split(", ")
    assert [hop.partition("[")[2] for hop in route] == [f"{layers}]" for layers in SPLIT]
    assert "first-token;dur=" in raw.headers["server-timing"]


# --- room ----------------------------------------------------------------------------


def fill_shards(client: OpenAI) -> None:
    """Let every shard run as many sessions as it takes, whose readers then go away.

    Those of others have to be over before, since nobody gives way to them.
    """
    with open_streams(client, LIMITS.max_sessions):
        pass


def test_readers_that_go_away_free_the_room_of_every_shard(world: World, client: OpenAI) -> None:
    fill_shards(client)
    steps = world.steps()
    for _ in range(3):
        fill_shards(client)
    assert complete(client, PARIS).choices[0].message.content == PARIS["text"]
    assert world.steps() - steps < MANY_TOKENS, "they were generated to their end"


def test_a_reader_of_a_whole_answer_that_goes_away_frees_its_room(
    world: World, client: OpenAI
) -> None:
    fill_shards(client)
    steps = world.steps()
    with pytest.raises(APITimeoutError):
        complete(client.with_options(timeout=0.3), STORY, max_tokens=MANY_TOKENS)
    fill_shards(client)
    assert world.steps() - steps < MANY_TOKENS, "it was generated to its end"
