"""Every property of OpenAI's requests has a fate, and answers have OpenAI's form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import pytest

from pals.api.openai.chat import chat_params
from pals.api.openai.completions import completion_params
from pals.api.openai.fields import CHAT_FIELDS, COMPLETION_FIELDS, EMBEDDING_FIELDS, FieldTable
from pals.api.openai.reading import read_request
from pals.api.openai.schema.chat import ChatRequest
from pals.api.openai.schema.completions import CompletionRequest
from pals.api.openai.schema.embeddings import EmbeddingRequest
from pals.driver.interface import GenerateParams
from pals.errors import UnsupportedParameter
from pals.text.answers.tools import ToolSpec, ToolUse
from pals.types import Grammar
from tests.openai_schema import component, properties

VOCAB = 50
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "hi"}
EMBEDDING = {"model": "m", "input": "hi"}
FUNCTION = {"name": "f"}
TOOLS = {"tools": [{"type": "function", "function": FUNCTION}]}
SPECS = (ToolSpec(name="f"),)

Fate = tuple[Mapping[str, object], Mapping[str, object]]
"""Fields of a request, and what they make of the driver's parameters."""

SAMPLING: Mapping[str, Fate] = {
    "frequency_penalty": ({"frequency_penalty": -2}, {"frequency_penalty": -2.0}),
    "logit_bias": ({"logit_bias": {"7": -100, "49": 2.5}}, {"logit_bias": ((7, -100), (49, 2.5))}),
    "n": ({"n": 3}, {"n": 3}),
    "presence_penalty": ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
    "seed": ({"seed": -5}, {"seed": -5}),
    "stop": ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
    "temperature": ({"temperature": 0}, {"temperature": 0.0}),
    "top_p": ({"top_p": 0.25}, {"top_p": 0.25}),
}

CHAT_FATES: Mapping[str, Fate] = {
    **SAMPLING,
    "function_call": (
        {"functions": [FUNCTION], "function_call": {"name": "f"}},
        {"tools": ToolUse(tools=SPECS, choice="f", named=True, parallel=False)},
    ),
    "functions": (
        {"functions": [FUNCTION]},
        {"tools": ToolUse(tools=SPECS, choice="auto", parallel=False)},
    ),
    "logprobs": ({"logprobs": True}, {"logprobs": 0}),
    "max_completion_tokens": ({"max_completion_tokens": 9}, {"max_tokens": 9}),
    "max_tokens": ({"max_tokens": 9}, {"max_tokens": 9}),
    "parallel_tool_calls": (
        {**TOOLS, "parallel_tool_calls": False},
        {"tools": ToolUse(tools=SPECS, parallel=False)},
    ),
    "reasoning_effort": ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
    "response_format": (
        {"response_format": {"type": "json_object"}},
        {"grammar": Grammar(kind="json_object")},
    ),
    "tool_choice": (
        {**TOOLS, "tool_choice": "required"},
        {"tools": ToolUse(tools=SPECS, choice="required")},
    ),
    "tools": (TOOLS, {"tools": ToolUse(tools=SPECS)}),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 20}, {"logprobs": 20}),
}

COMPLETION_FATES: Mapping[str, Fate] = {
    **SAMPLING,
    "best_of": ({"best_of": 4}, {"best_of": 4}),
    "echo": ({"echo": True}, {"echo": True}),
    "logprobs": ({"logprobs": 5}, {"logprobs": 5}),
    "max_tokens": ({"max_tokens": 0}, {"max_tokens": 0}),
}

LABELS: Mapping[str, object] = {
    "metadata": {"a": "b"},
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "service_tier": "auto",
    "user": "u",
}
"""Fields that label or speed up a request and change no answer."""

ELSEWHERE = {
    "chat": {"messages", "model", "stream", "stream_options"},
    "completion": {"model", "prompt", "stream", "stream_options"},
    "embedding": {"dimensions", "encoding_format", "input", "model"},
}
"""Fields that are no parameter of the driver; the tests of their routes are about them."""


def chat(fields: Mapping[str, object]) -> GenerateParams:
    body = msgspec.json.encode(CHAT | dict(fields))
    return chat_params(read_request(body, CHAT_FIELDS, ChatRequest), vocab_size=VOCAB)


def completion(fields: Mapping[str, object]) -> GenerateParams:
    body = msgspec.json.encode(COMPLETION | dict(fields))
    request = read_request(body, COMPLETION_FIELDS, CompletionRequest)
    return completion_params(request, vocab_size=VOCAB)


def embedding(fields: Mapping[str, object]) -> EmbeddingRequest:
    body = msgspec.json.encode(EMBEDDING | dict(fields))
    return read_request(body, EMBEDDING_FIELDS, EmbeddingRequest)


KINDS: Mapping[str, tuple[str, FieldTable, Mapping[str, Fate], Callable[..., Any]]] = {
    "chat": ("CreateChatCompletionRequest", CHAT_FIELDS, CHAT_FATES, chat),
    "completion": ("CreateCompletionRequest", COMPLETION_FIELDS, COMPLETION_FATES, completion),
    "embedding": ("CreateEmbeddingRequest", EMBEDDING_FIELDS, {}, embedding),
}
ALL = [(kind, name) for kind in KINDS for name in properties(component(KINDS[kind][0]))]


def test_openai_s_file_is_read() -> None:
    names = {kind: {n for k, n in ALL if k == kind} for kind in KINDS}

    assert len(names["chat"]) >= 35
    assert len(names["completion"]) >= 18
    assert names["embedding"] == {"dimensions", "encoding_format", "input", "model", "user"}


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_every_property_works_or_changes_nothing_or_is_refused_by_name(
    kind: str, name: str
) -> None:
    _, table, fates, read = KINDS[kind]
    if name in ELSEWHERE[kind]:
        assert name in table.struct.__struct_fields__
    elif name in fates:
        fields, effect = fates[name]
        assert name in fields
        assert {key: getattr(read(fields), key) for key in effect} == effect
        assert read(fields) != read({})
    elif name in LABELS:
        made, plain = read({name: LABELS[name]}), read({})
        assert kind == "embedding" or made == plain
    else:
        assert table.refused[name].reason
        read({name: None})
        with pytest.raises(UnsupportedParameter) as caught:
            read({name: {"some": "value"}})
        assert caught.value.fields["param"] == name


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_null_asks_for_the_default_where_openai_takes_it(kind: str, name: str) -> None:
    read = KINDS[kind][3]
    required = component(KINDS[kind][0]).get("required", [])
    if kind == "embedding" or name in {"messages", "model", "prompt", *required}:
        return

    assert read({name: None}) == read({})
