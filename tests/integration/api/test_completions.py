"""Prompts, embeddings, tools and several answers, as OpenAI's own client sees them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI
from pydantic import BaseModel

from pals.api.openai import embeddings
from pals.api.openai.embeddings import embedding_list
from pals.api.openai.schema.embeddings import EmbeddingList
from pals.driver.interface import Delta, GenerateParams
from pals.errors import NoChain, ShardLost
from pals.text.answers.pieces import Content, Reasoning, ToolArguments, ToolCall
from pals.types import Grammar
from tests.fakes import FakeDriver
from tests.integration.api.servers import running

MODEL = "test/tiny"
MESSAGES = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = [
    Delta(pieces=(Reasoning("hm"), ToolCall(0, "call_1", "add"), ToolArguments(0, '{"a"'))),
    Delta(pieces=(ToolArguments(0, ": 1}"),), finish_reason="tool_calls"),
]


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


@pytest.fixture
def url(driver: FakeDriver) -> Iterator[str]:
    with running(driver) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=20) as made:
        yield made


def test_a_prompt_is_completed_whole_and_streamed(client: OpenAI, driver: FakeDriver) -> None:
    whole = client.completions.create(model=MODEL, prompt="Once", max_tokens=5, n=2)
    stream = client.completions.create(
        model=MODEL, prompt="Once", stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream

    assert [choice.text for choice in whole.choices] == ["Hello!", "Hello!"]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello!"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert whole.id.startswith("cmpl-")
    assert last.usage.total_tokens == 10
    assert driver.prompts == [
        ("Once", GenerateParams(max_tokens=5, n=2)),
        ("Once", GenerateParams(max_tokens=16)),
    ]


def test_several_prompts_are_completed_in_order(client: OpenAI, driver: FakeDriver) -> None:
    answer = client.completions.create(model=MODEL, prompt=[[1, 2], [3]], n=2)

    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {choice.text for choice in answer.choices} == {"Hello!"}
    assert sorted(prompt for prompt, _ in driver.prompts) == [(1, 2), (3,)]
    assert answer.usage.prompt_tokens == 14
    assert all(completion.closed.is_set() for completion in driver.completions)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [1, 100]}, "prompt"),
        ({"prompt": False}, "prompt"),
        ({"prompt": 0}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 2}, "n"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "logit_bias": {"100": 1}}, "logit_bias"),
    ],
)
def test_a_prompt_that_cannot_be_completed_names_its_field(
    client: OpenAI, driver: FakeDriver, fields: dict, param: str
) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.completions.create(model=MODEL, **fields)

    assert caught.value.param == param
    assert not driver.prompts


@pytest.mark.parametrize("coding", ["float", "base64"])
def test_embeddings_are_given_in_both_encodings(client: OpenAI, coding: str) -> None:
    answer = client.embeddings.create(
        model=MODEL, input=["abc", "d"], dimensions=2, encoding_format=coding
    )

    vectors = [data.embedding for data in answer.data]
    if coding == "float":
        assert vectors == [pytest.approx([0.6, 0.8])] * 2
    assert answer.usage.prompt_tokens == 4


def test_embeddings_are_numbers_by_default_to_a_client_that_asks_for_base64(
    client: OpenAI,
) -> None:
    [data] = client.embeddings.create(model=MODEL, input="abc").data

    assert data.embedding == pytest.approx([3 / 85, 4 / 85, 12 / 85, 84 / 85])


def test_an_embedding_of_nothing_is_refused(client: OpenAI, driver: FakeDriver) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.embeddings.create(model=MODEL, input=["a", ""])

    assert caught.value.param == "input"
    assert not driver.embedded


def test_more_dimensions_than_there_are_cost_nothing(client: OpenAI, driver: FakeDriver) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.embeddings.create(model=MODEL, input="a", dimensions=driver.embedding_size + 1)

    assert caught.value.param == "dimensions"
    assert not driver.embedded


def test_embeddings_are_written_beside_the_event_loop(
    client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops: list[bool] = []

    def noting(*args: Any) -> EmbeddingList:
        loops.append(_runs_a_loop())
        return embedding_list(*args)

    monkeypatch.setattr(embeddings, "embedding_list", noting)

    client.embeddings.create(model=MODEL, input="a")

    assert loops == [False]


def _runs_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def test_a_refusal_of_the_driver_has_its_status(url: str, driver: FakeDriver) -> None:
    driver.refusal = NoChain(model="m", missing="0:4")
    bodies = {"completions": {"prompt": ["a", "b"]}, "embeddings": {"input": "a"}}

    statuses = [
        httpx.post(f"{url}/v1/{path}", json={"model": MODEL} | body).status_code
        for path, body in bodies.items()
    ]

    assert statuses == [503, 503]


def test_a_stream_of_several_prompts_ends_with_the_error_of_one(
    url: str, driver: FakeDriver
) -> None:
    driver.end = ShardLost(peer="p", layers="0:2", problem="gone")

    body = {"model": MODEL, "prompt": ["a", "b"], "stream": True}
    response = httpx.post(f"{url}/v1/completions", json=body)

    assert response.status_code == 200
    *_, last = [line for line in response.text.split("\n") if line]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "PALS-SHARD-LOST"


# --- conversations -------------------------------------------------------------------


def test_several_answers_are_streamed_side_by_side(client: OpenAI, driver: FakeDriver) -> None:
    texts = {0: "", 1: ""}

    for chunk in client.chat.completions.create(
        model=MODEL, messages=MESSAGES, n=2, seed=5, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""

    assert texts == {0: "Hello!", 1: "Hello!"}
    assert driver.calls[0][1] == GenerateParams(n=2, seed=5)


def test_a_call_of_a_tool_reaches_the_client_whole_and_streamed(
    client: OpenAI, driver: FakeDriver
) -> None:
    driver.script, driver.end = CALL, "tool_calls"

    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[TOOL])
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, tools=[TOOL]) as stream:
        streamed = stream.get_final_completion()

    for answer in (whole, streamed):
        [choice] = answer.choices
        [call] = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls"
        assert (call.id, call.function.name) == ("call_1", "add")
        assert json.loads(call.function.arguments) == {"a": 1}
    assert whole.choices[0].message.reasoning_content == "hm"


class Point(BaseModel):
    x: int
    y: int


def test_a_parsed_answer_asks_for_its_schema(client: OpenAI, driver: FakeDriver) -> None:
    driver.script = [Delta(pieces=(Content('{"x": 1, "y": 2}'),))]

    answer = client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Point)

    assert answer.choices[0].message.parsed == Point(x=1, y=2)
    grammar = driver.calls[0][1].grammar
    assert isinstance(grammar, Grammar)
    assert json.loads(grammar.source)["required"] == ["x", "y"]


# --- headers and counts --------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_headers_tell_the_route_and_where_the_time_went(url: str, stream: bool) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "stream": stream}

    headers = httpx.post(f"{url}/v1/chat/completions", json=body).headers

    assert headers["x-pals-route"] == "peer-a[0:2], peer-b[2:4]"
    assert headers["server-timing"] == (
        "queue;dur=1.5, first-token;dur=20.0, "
        'shard-0;desc="peer-a[0:2]";dur=2.50, shard-1;desc="peer-b[2:4]";dur=3.25'
    )
    assert headers["openai-processing-ms"] == "22"
    assert headers["x-request-id"]


def test_metrics_count_requests_and_tokens(url: str) -> None:
    httpx.post(f"{url}/v1/completions", json={"model": MODEL, "prompt": "a"})

    response = httpx.get(f"{url}/metrics")

    assert response.headers["content-type"].startswith("text/plain")
    assert 'pals_tokens_total{kind="completion"} 3.0' in response.text
    assert "pals_completions_running 0.0" in response.text
    route = 'route="POST /v1/completions",status="200"'
    assert f"pals_request_seconds_count{{{route}}} 1.0" in response.text


def test_each_model_is_asked_by_its_name() -> None:
    first, second = FakeDriver(["one"]), FakeDriver(["two"])
    second.model_id = "test/other"

    with running(first, second) as url:
        listed = httpx.get(f"{url}/v1/models").json()["data"]
        body = {"model": "test/other", "messages": MESSAGES}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body).json()
        chain = httpx.get(f"{url}/pals/chain", params={"model": "test/other"}).json()
        unknown = httpx.get(f"{url}/pals/chain", params={"model": "no"})

    assert [model["id"] for model in listed] == ["test/tiny", "test/other"]
    assert (answer["model"], answer["choices"][0]["message"]["content"]) == ("test/other", "two")
    assert chain["model"] == "test/other"
    assert unknown.status_code == 404
