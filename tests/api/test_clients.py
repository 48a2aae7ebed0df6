"""Programs that speak to OpenAI, pointed at a model that three shards serve together."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.lib.streaming.chat import ContentDoneEvent
from pydantic import BaseModel

from pals.models.gguf import DEMO_MODEL_ID
from tests.demo_model import load_goldens
from tests.integration.demo_endpoint import World, demo_endpoint
from tests.integration.pages import ROOT, blocks

pytestmark = pytest.mark.timeout(180)

PARIS, _, ANIMALS, _, _ = load_goldens()["prompts"]
QUESTION = PARIS["messages"][0]["content"]
DEADLINE_S = 60.0
GREEDY = {"model": DEMO_MODEL_ID, "temperature": 0, "max_tokens": 48}
GUIDE = (ROOT / "docs" / "clients.md").read_text()
GUIDE_URL = "http://127.0.0.1:8080"


class City(BaseModel):
    """What the answer has to be."""

    name: Literal["Paris", "Rome"]
    capital: bool


class Weather(BaseModel):
    """Tell the weather of a city."""

    city: Literal["Paris", "Rome"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Iterator[World]:
    with demo_endpoint(tmp_path_factory.mktemp("clients"), shared_cache) as made:
        yield made


def options(world: World) -> dict:
    return {
        "base_url": f"{world.url}/v1",
        "api_key": "unused",
        "max_retries": 0,
        "timeout": DEADLINE_S,
    }


@pytest.fixture
def client(world: World) -> Iterator[OpenAI]:
    with OpenAI(**options(world)) as made:
        yield made


# --- the openai package --------------------------------------------------------------


def test_the_model_is_listed_and_found_by_its_name(client: OpenAI) -> None:
    (model,) = client.models.list()

    assert (model.id, model.owned_by) == (DEMO_MODEL_ID, "pals")
    assert client.models.retrieve(DEMO_MODEL_ID) == model


def test_the_asynchronous_client_reads_whole_and_streamed_answers_side_by_side(
    world: World,
) -> None:
    async def streamed(client: AsyncOpenAI) -> str:
        chunks = await client.chat.completions.create(
            messages=ANIMALS["messages"], stream=True, **GREEDY
        )
        return "".join([c.choices[0].delta.content or "" async for c in chunks])

    async def both() -> tuple[str | None, str]:
        async with AsyncOpenAI(**options(world)) as client:
            whole = client.chat.completions.create(messages=PARIS["messages"], **GREEDY)
            answer, text = await asyncio.gather(whole, streamed(client))
        return answer.choices[0].message.content, text

    assert asyncio.run(both()) == (PARIS["text"], ANIMALS["text"])


def test_several_scored_answers_are_streamed_as_they_are_whole(client: OpenAI) -> None:
    asked = GREEDY | {"n": 2, "logprobs": True, "top_logprobs": 2, "max_tokens": 4}

    whole = client.chat.completions.create(messages=PARIS["messages"], **asked).choices
    with client.chat.completions.create(messages=PARIS["messages"], stream=True, **asked) as chunks:
        parts = [choice for chunk in chunks for choice in chunk.choices]

    assert [choice.index for choice in whole] == [0, 1]
    for choice in whole:
        own = [part for part in parts if part.index == choice.index]
        scores = [score for part in own if part.logprobs for score in part.logprobs.content]
        assert scores == choice.logprobs.content
        assert {len(score.top_logprobs) for score in scores} == {2}
        assert "".join(part.delta.content or "" for part in own) == choice.message.content
        assert PARIS["text"].startswith(choice.message.content)


def test_a_pydantic_model_is_parsed_from_a_stream(client: OpenAI) -> None:
    with client.chat.completions.stream(
        messages=PARIS["messages"], response_format=City, **GREEDY
    ) as stream:
        done = [event for event in stream if isinstance(event, ContentDoneEvent)]
        final = stream.get_final_completion()

    assert isinstance(done[0].parsed, City)
    assert final.choices[0].message.parsed == done[0].parsed
    assert final.usage is None


def test_a_tool_is_called_in_a_stream_and_its_result_read(client: OpenAI) -> None:
    asked = {"tools": [openai.pydantic_function_tool(Weather)], "tool_choice": "required"}
    whole = client.chat.completions.parse(messages=PARIS["messages"], **asked, **GREEDY)
    with client.chat.completions.stream(messages=PARIS["messages"], **asked, **GREEDY) as stream:
        message = stream.get_final_completion().choices[0].message

    call = message.tool_calls[0]
    assert isinstance(call.function.parsed_arguments, Weather)
    assert call.function.arguments == whole.choices[0].message.tool_calls[0].function.arguments

    said = {"role": "tool", "tool_call_id": call.id, "content": "It rains."}
    made = message.model_dump(include={"role", "content", "tool_calls"}, exclude_none=True)
    for each in made["tool_calls"]:
        del each["index"], each["function"]["parsed_arguments"]
    answer = client.chat.completions.create(messages=[*PARIS["messages"], made, said], **GREEDY)
    assert answer.choices[0].message.content


def test_embeddings_are_the_same_in_both_encodings(client: OpenAI) -> None:
    asked = {"model": DEMO_MODEL_ID, "input": "a fox and the sea"}

    packed = client.embeddings.create(**asked).data[0].embedding  # base64, unpacked by the client
    listed = client.embeddings.create(**asked, encoding_format="float").data[0].embedding
    cut = client.embeddings.create(**asked, dimensions=8).data[0].embedding

    assert packed == pytest.approx(listed, abs=1e-3)
    assert len(cut) == 8
    assert np.linalg.norm(cut) == pytest.approx(1, abs=1e-5)


def test_a_prompt_is_continued_whole_and_streamed(world: World, client: OpenAI) -> None:
    asked = GREEDY | {"prompt": "The capital of France is", "max_tokens": 6}

    whole = client.completions.create(**asked, echo=True, logprobs=0).choices[0]
    with client.completions.create(**asked, stream=True) as chunks:
        text = "".join(chunk.choices[0].text for chunk in chunks)

    assert whole.text == asked["prompt"] + text
    assert "".join(whole.logprobs.tokens) == whole.text
    assert whole.logprobs.token_logprobs[0] is None


@pytest.mark.parametrize(
    ("changes", "kind", "code", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model_not_found", "model"),
        ({"temperature": 9}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"max_tokens": 9999}, openai.BadRequestError, "context_length_exceeded", None),
        ({"extra_body": {"colour": 1}}, openai.BadRequestError, "unknown_parameter", "colour"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_refusals_are_exceptions_of_the_client(
    client: OpenAI, changes: Mapping[str, object], kind: type, code: str, param: str | None
) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(messages=PARIS["messages"], **(GREEDY | changes))

    assert caught.value.code == code
    if param is not None:
        assert caught.value.param == param


# --- the llm program -----------------------------------------------------------------


@pytest.fixture
def llm_folder(world: World, tmp_path: Path) -> Path:
    """Return a folder with the settings that the guide shows."""
    text = next(content for _, content in blocks(GUIDE, "yaml"))
    (tmp_path / "extra-openai-models.yaml").write_text(text.replace(GUIDE_URL, world.url))
    return tmp_path


def run_llm(folder: Path, *arguments: str) -> str:
    """Run `llm` with nothing of its user's, and return what it prints."""
    variables = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "LLM_USER_PATH": str(folder),
        "LLM_LOAD_PLUGINS": "",  # the demo model's package is one, and lacks what it would run
    }
    command = [sys.executable, "-m", "llm", *arguments]
    done = subprocess.run(
        command,
        env=variables,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def prompt(folder: Path, *arguments: str, is_logged: bool = False, most_tokens: int = 48) -> str:
    """Ask for the likeliest text; the log is a database, which takes long to make."""
    options = ["-o", "temperature", "0", "-o", "max_tokens", str(most_tokens)]
    log = "--log" if is_logged else "--no-log"
    return run_llm(folder, "prompt", log, *options, *arguments).strip()


def test_llm_prints_a_whole_answer(llm_folder: Path) -> None:
    assert prompt(llm_folder, "-m", "pals", "--no-stream", QUESTION) == PARIS["text"]


def test_llm_prints_a_streamed_answer_and_logs_its_tokens(llm_folder: Path) -> None:
    text = prompt(llm_folder, "-m", "pals", QUESTION, is_logged=True)

    assert text == PARIS["text"]
    (logged,) = json.loads(run_llm(llm_folder, "logs", "--json"))
    tokens = (len(PARIS["prompt_ids"]), len(PARIS["token_ids"]))
    assert (logged["input_tokens"], logged["output_tokens"]) == tokens


def test_llm_gets_an_object_of_its_schema(llm_folder: Path) -> None:
    schema = json.dumps(City.model_json_schema())

    City.model_validate_json(prompt(llm_folder, "-m", "pals", "--schema", schema, QUESTION))


def test_llm_completes_text(llm_folder: Path) -> None:
    text = prompt(llm_folder, "-m", "pals-text", "The capital of France is", most_tokens=4)

    assert "Paris" in text
