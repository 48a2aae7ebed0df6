from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from pals.api.openai.chat_form import ChatForm
from pals.api.openai.fields import CHAT_FIELDS
from pals.api.openai.reading import read_request
from pals.api.openai.schema.chat import ChatRequest
from pals.api.openai.schema.shared import CompletionTokens, PromptTokens, Usage
from pals.driver.interface import Delta, TokenScore, TopScore
from pals.text.answers.pieces import Content, Reasoning, ToolArguments, ToolCall
from tests.openai_schema import component, problems

USAGE = Usage(
    prompt_tokens=3,
    completion_tokens=4,
    total_tokens=7,
    prompt_tokens_details=PromptTokens(cached_tokens=2),
    completion_tokens_details=CompletionTokens(reasoning_tokens=1),
)
EURO = "€".encode()
TOP = (TopScore(token=1, raw=b"a", logprob=-0.5), TopScore(token=2, raw=b"b", logprob=-1.0))
SCORE = TokenScore(token=1, raw=b"a", logprob=-0.5, top=TOP)
CALLS = (
    Delta(pieces=(ToolCall(0, "call_a", "f"), ToolArguments(0, '{"x":'))),
    Delta(pieces=(ToolArguments(0, "1}"), ToolCall(1, "call_b", "g"))),
    Delta(pieces=(ToolArguments(1, "{}"),), finish_reason="tool_calls"),
)
TOOLS = {"tools": [{"type": "function", "function": {"name": n}} for n in "fg"]}
FUNCTIONS = {"functions": [{"name": "f"}]}


def form(n: int = 1, **fields: object) -> ChatForm:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | fields
    return ChatForm(read_request(msgspec.json.encode(body), CHAT_FIELDS, ChatRequest), n=n)


def whole(deltas: Sequence[Delta], n: int = 1, **fields: object) -> dict[str, Any]:
    return json.loads(msgspec.json.encode(form(n, **fields).whole(deltas, USAGE)))


def choices(deltas: Sequence[Delta], **fields: object) -> list[dict[str, Any]]:
    writer = form(**fields)
    chunks = [chunk for delta in deltas for chunk in writer.chunks(delta)]
    return [json.loads(msgspec.json.encode(chunk))["choices"][0] for chunk in chunks]


def without_reasoning(answer: dict[str, Any]) -> dict[str, Any]:
    """Leave out what OpenAI's schema does not have."""
    for choice in answer["choices"]:
        choice.get("message", choice.get("delta")).pop("reasoning_content", None)
    return answer


def test_text_of_all_deltas_is_the_content() -> None:
    answer = whole([Delta(pieces=(Content("a"),)), Delta(pieces=(Content("b"),)), Delta()])

    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": "ab",
        "refusal": None,
    }
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 1}
    assert "service_tier" not in answer


def test_reasoning_is_apart_from_the_content() -> None:
    deltas = [Delta(pieces=(Reasoning("hm"), Content("a"))), Delta(finish_reason="stop")]

    assert whole(deltas)["choices"][0]["message"]["reasoning_content"] == "hm"
    assert [choice["delta"] for choice in choices(deltas)] == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "hm"},
        {"content": "a"},
        {},
    ]


def test_calls_are_whole_and_the_content_null() -> None:
    [choice] = whole(CALLS, **TOOLS)["choices"]

    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [
            {
                "id": "call_a",
                "type": "function",
                "function": {"name": "f", "arguments": '{"x":1}'},
            },
            {"id": "call_b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }


def test_calls_are_streamed_as_deltas() -> None:
    parts = choices(CALLS, **TOOLS)

    assert [part["delta"] for part in parts] == [
        {"role": "assistant", "content": ""},
        {
            "tool_calls": [
                {
                    "index": 0,
                    "id": "call_a",
                    "type": "function",
                    "function": {"name": "f", "arguments": ""},
                }
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"x":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]},
        {
            "tool_calls": [
                {
                    "index": 1,
                    "id": "call_b",
                    "type": "function",
                    "function": {"name": "g", "arguments": ""},
                }
            ]
        },
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
        {},
    ]
    assert parts[-1]["finish_reason"] == "tool_calls"


def test_calls_of_functions_have_the_old_form_with_room_for_one() -> None:
    [choice] = whole(CALLS, **FUNCTIONS)["choices"]
    parts = choices(CALLS, **FUNCTIONS)

    assert choice["finish_reason"] == parts[-1]["finish_reason"] == "function_call"
    assert choice["message"]["function_call"] == {"name": "f", "arguments": '{"x":1}'}
    assert "tool_calls" not in choice["message"]
    assert [part["delta"].get("function_call") for part in parts] == [
        None,
        {"name": "f", "arguments": ""},
        {"arguments": '{"x":'},
        {"arguments": "1}"},
        None,
    ]


def test_answers_are_kept_apart_and_each_begins_with_its_role() -> None:
    deltas = [
        Delta(choice=1, pieces=(Content("b"),)),
        Delta(choice=0, pieces=(Content("a"),), finish_reason="length"),
        Delta(choice=1, finish_reason="stop"),
    ]

    answers = whole(deltas, n=2)["choices"]

    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in answers] == [
        (0, "a", "length"),
        (1, "b", "stop"),
    ]
    assert [(c["index"], c["delta"].get("role")) for c in choices(deltas)] == [
        (1, "assistant"),
        (1, None),
        (0, "assistant"),
        (0, None),
        (0, None),
        (1, None),
    ]


def test_scores_come_with_their_text_once_whole_and_streamed() -> None:
    deltas = [
        Delta(pieces=(Content("a"), Content("b")), scores=(SCORE,)),
        Delta(scores=(SCORE,)),
        Delta(finish_reason="stop"),
    ]
    shown = {
        "token": "a",
        "logprob": -0.5,
        "bytes": [97],
        "top_logprobs": [
            {"token": "a", "logprob": -0.5, "bytes": [97]},
            {"token": "b", "logprob": -1.0, "bytes": [98]},
        ],
    }

    [choice] = whole(deltas, logprobs=True)["choices"]
    parts = choices(deltas, logprobs=True)

    assert choice["logprobs"] == {"content": [shown, shown], "refusal": None}
    assert [part["logprobs"] and len(part["logprobs"]["content"]) for part in parts] == [
        None,
        1,
        None,
        1,
        None,
    ]


def test_no_scores_are_null_where_nobody_asked() -> None:
    assert whole([Delta()])["choices"][0]["logprobs"] is None
    assert whole([Delta()], logprobs=True)["choices"][0]["logprobs"]["content"] == []


@pytest.mark.parametrize(
    ("raw", "token"), [(EURO, "€"), (EURO[:2], "\\xe2\\x82"), (b" a" + EURO[:1], " a\\xe2")]
)
def test_bytes_of_a_token_are_exact_across_borders_of_characters(raw: bytes, token: str) -> None:
    score = TokenScore(token=1, raw=raw, logprob=float("-inf"))

    [written] = whole([Delta(scores=(score,))], logprobs=True)["choices"][0]["logprobs"]["content"]

    assert (written["token"], bytes(written["bytes"])) == (token, raw)
    assert written["logprob"] == -9999.0


def test_the_service_tier_is_told_to_whoever_names_one() -> None:
    assert whole([Delta()], service_tier="auto")["service_tier"] == "default"


EVERYTHING = [
    Delta(pieces=(Reasoning("hm"), Content("a")), scores=(SCORE,)),
    *CALLS,
    Delta(choice=1, pieces=(Content("b"),), finish_reason="length"),
]


@pytest.mark.parametrize("fields", [TOOLS, FUNCTIONS, {}])
def test_whole_answers_have_openai_s_form(fields: dict[str, Any]) -> None:
    answer = without_reasoning(
        whole(EVERYTHING, n=2, logprobs=True, service_tier="default", **fields)
    )

    assert problems(answer, component("CreateChatCompletionResponse")) == []


@pytest.mark.parametrize("fields", [TOOLS, FUNCTIONS, {}])
def test_chunks_have_openai_s_form(fields: dict[str, Any]) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True}
    writer = form(**options, **fields)
    chunks = [chunk for delta in EVERYTHING for chunk in writer.chunks(delta)]
    last = writer.usage_chunk(USAGE)
    assert last is not None

    for chunk in (*chunks, last):
        written = without_reasoning(json.loads(msgspec.json.encode(chunk)))
        assert problems(written, component("CreateChatCompletionStreamResponse")) == []


def test_usage_is_null_until_the_last_chunk_and_absent_unless_asked_for() -> None:
    asked = form(stream=True, stream_options={"include_usage": True})
    plain = form(stream=True)

    assert all(c.usage is None for c in asked.chunks(Delta(pieces=(Content("a"),))))
    assert plain.usage_chunk(USAGE) is None
    assert b"usage" not in msgspec.json.encode(plain.chunks(Delta())[0])
