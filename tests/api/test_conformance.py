"""Requests made from OpenAI's own OpenAPI file, and whether the answers have its form."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import Case, GenerationMode, Response
from schemathesis.checks import CheckFunction
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from pals.api.gate import GateSettings
from pals.api.openai import build_openai_app
from pals.api.openai.fields import CHAT_FIELDS, COMPLETION_FIELDS
from tests.api.scripted import ScriptedDriver
from tests.api.vendor import SERVED, document
from tests.openai_schema import Schema, component, problems

MODEL = ScriptedDriver.model_id
URL = "http://127.0.0.1:8000/v1"
SEEDS = (1, 2, 3)
FEW, MANY = 8, 300
MOST_EVENTS = 10_000
CHECKS: list[CheckFunction] = [
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]
"""All that is known of an answer; that there is no 5xx follows from the statuses."""

REFUSED = {
    "CreateChatCompletionRequest": CHAT_FIELDS.refused,
    "CreateCompletionRequest": COMPLETION_FIELDS.refused,
}
NARROWED: Mapping[str, Schema] = {
    "CreateEmbeddingRequest": {
        "dimensions": {"type": "integer", "minimum": 1, "maximum": ScriptedDriver.embedding_size},
        "input": {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
                {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
            ]
        },
    }
}
"""What a model has: the file knows neither how wide it is nor its tokens."""
STREAMED: Mapping[str, str] = {
    "/chat/completions": "CreateChatCompletionStreamResponse",
    "/completions": "CreateCompletionResponse",
}
POSTED = [path for path, method in SERVED.items() if method == "post"]

EXTENSIONS = ("reasoning_content",)
"""What an answer may have besides, as those of other servers of open models do."""


def served(
    without: Mapping[str, Collection[str]] | None = None,
    narrowed: Mapping[str, Schema] | None = None,
) -> BaseSchema:
    """Return OpenAI's document, bound to an application over a driver that has a script."""
    schema = schemathesis.openapi.from_dict(document(MODEL, without=without, narrowed=narrowed))
    schema.config.max_stream_events = MOST_EVENTS
    gate = GateSettings.for_bind("127.0.0.1", 8000, keys=None)
    schema.app = build_openai_app({MODEL: ScriptedDriver()}, gate=gate)
    return schema


def play(
    schema: BaseSchema,
    path: str,
    mode: GenerationMode,
    number: int,
    count: int,
    see: Callable[[Case, Response], None],
) -> Counter[int]:
    """Send ``count`` requests, show ``see`` the answers, and return how many had which status."""
    statuses: Counter[int] = Counter()
    requests = schema[path][SERVED[path].upper()].as_strategy(generation_mode=mode)

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=requests)
    def run(case: Case) -> None:
        response = case.call(base_url=URL)
        statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)
        see(case, response)

    run()
    return statuses


def names_what_is_wrong(case: Case, response: Response) -> None:
    """Check that a refusal says which field it is about, unless the body is no object."""
    if response.status_code >= 400 and isinstance(case.body, dict):
        assert response.json()["error"]["param"], response.text


def is_streamed_too(case: Case, response: Response) -> None:
    """Check that an accepted request can be streamed, in events of OpenAI's form."""
    names_what_is_wrong(case, response)
    if response.status_code != 200 or case.path not in STREAMED:
        return
    case.body["stream"] = True
    case.body.pop("best_of", None)  # answers that are compared cannot be streamed
    text = case.call(base_url=URL).text
    *events, done = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    assert done == "[DONE]"
    assert events
    for event in events:
        assert_has_form(json.loads(event), STREAMED[case.path])


def assert_has_form(chunk: dict, name: str) -> None:
    for choice in chunk["choices"]:
        for extension in EXTENSIONS:
            choice.get("delta", {}).pop(extension, None)
        # Null until the last chunk, which the file says of conversations alone.
        choice["finish_reason"] = choice["finish_reason"] or "stop"
    if chunk.get("usage", 0) is None:  # so says the text on `include_usage`, if no schema
        del chunk["usage"]
    assert problems(chunk, component(name)) == []


@pytest.mark.parametrize("number", SEEDS)
@pytest.mark.parametrize("path", SERVED)
def test_what_the_schema_allows_is_answered_or_refused_by_name(path: str, number: int) -> None:
    statuses = play(served(), path, GenerationMode.POSITIVE, number, FEW, names_what_is_wrong)

    assert set(statuses) <= {200, 400, 404}


@pytest.mark.parametrize("number", SEEDS)
@pytest.mark.parametrize("path", POSTED)
def test_what_is_implemented_is_answered_whole_and_streamed(path: str, number: int) -> None:
    schema = served(without=REFUSED, narrowed=NARROWED)

    statuses = play(schema, path, GenerationMode.POSITIVE, number, FEW, is_streamed_too)

    assert set(statuses) <= {200, 400}
    assert statuses[200] > 0, "no request was accepted: this proves nothing"


@pytest.mark.parametrize("number", SEEDS)
@pytest.mark.parametrize("path", POSTED)
def test_what_the_schema_forbids_is_refused_by_name(path: str, number: int) -> None:
    statuses = play(served(), path, GenerationMode.NEGATIVE, number, FEW, names_what_is_wrong)

    assert statuses
    assert set(statuses) <= {400, 404}


@pytest.mark.slow
@pytest.mark.parametrize("number", SEEDS)
@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("path", POSTED)
def test_many_requests_find_no_answer_of_another_form(
    path: str, mode: GenerationMode, number: int
) -> None:
    statuses = play(served(without=REFUSED), path, mode, number, MANY, is_streamed_too)

    refused = {400, 404}
    assert statuses
    assert set(statuses) <= (refused if mode is GenerationMode.NEGATIVE else refused | {200})
