from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pals.api.openai.chat import chat_params
from pals.api.openai.conversation import conversation
from pals.api.openai.fields import CHAT_FIELDS
from pals.api.openai.reading import read_request
from pals.api.openai.schema.chat import ChatRequest
from pals.driver.interface import GenerateParams, MadeCall, Message
from pals.errors import InvalidRequest, UnknownParameter, UnsupportedParameter
from pals.text.answers.tools import ToolSpec, ToolUse
from pals.types import MAX_GRAMMAR_BYTES, Grammar

VOCAB = 100
HELLO = [{"role": "user", "content": "hello"}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def parse(**fields: object) -> ChatRequest:
    body = msgspec.json.encode({"model": "m", "messages": HELLO} | fields)
    return read_request(body, CHAT_FIELDS, ChatRequest)


def params(**fields: object) -> GenerateParams:
    return chat_params(parse(**fields), vocab_size=VOCAB)


def turns(*messages: dict[str, Any]) -> list[Message]:
    return conversation(parse(messages=list(messages)).messages)


def tool(name: str, **function: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name} | function}


def named(name: str) -> dict[str, object]:
    return {"type": "function", "function": {"name": name}}


def refusal(**fields: object) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        params(**fields)
    return caught.value


def test_least_request_has_openai_defaults() -> None:
    assert params() == GenerateParams(max_tokens=None, temperature=1.0, top_p=1.0, n=1)
    assert turns(*HELLO) == [Message(role="user", content="hello")]


def test_fields_of_other_servers_reach_the_driver() -> None:
    made = params(top_k=40, min_p=0.05, repetition_penalty=1.1)

    assert (made.top_k, made.min_p, made.repetition_penalty) == (40, 0.05, 1.1)


def test_a_top_p_of_zero_takes_the_likeliest_token() -> None:
    assert 0 < params(top_p=0).top_p < 1e-5


def test_a_single_stop_string_is_a_list_of_one() -> None:
    assert params(stop="\n").stop == ("\n",)


def test_equal_token_limits_under_both_names_are_accepted() -> None:
    assert params(max_tokens=9, max_completion_tokens=9).max_tokens == 9


# --- messages ------------------------------------------------------------------------


def test_text_parts_become_lines() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]

    assert turns({"role": "user", "content": parts})[0].content == "one\ntwo"


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_every_role_is_passed_on_with_its_name(role: str) -> None:
    assert turns({"role": role, "content": "x", "name": "bob"}) == [
        Message(role=role, content="x", name="bob")
    ]


def test_calls_and_results_of_tools_are_passed_on() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "4"}

    assert turns(*HELLO, call, result)[1:] == [
        Message(
            role="assistant",
            content=None,
            tool_calls=(MadeCall(id="call_1", name="f", arguments='{"a": 1}'),),
        ),
        Message(role="tool", content="4", tool_call_id="call_1"),
    ]


def test_calls_of_functions_become_calls_of_tools() -> None:
    call = {"role": "assistant", "content": "", "function_call": CALL["function"]}
    result = {"role": "function", "name": "f", "content": None}

    assert turns(*HELLO, call, result)[1:] == [
        Message(
            role="assistant",
            content="",
            tool_calls=(MadeCall(id="call_f", name="f", arguments='{"a": 1}'),),
        ),
        Message(role="tool", content="", name="f", tool_call_id="call_f"),
    ]


def test_an_answer_of_this_endpoint_can_be_sent_back_as_it_came() -> None:
    message = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
        "reasoning_content": "so",
    }

    assert turns(message) == [Message(role="assistant", content="x", reasoning_content="so")]


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ({"content": None, "refusal": "no"}, "no"),
        ({"content": [{"type": "refusal", "refusal": "no"}]}, "no"),
        ({"content": None}, ""),
        ({}, ""),
    ],
)
def test_what_an_assistant_said_instead_of_an_answer_is_its_content(
    message: dict[str, Any], content: str
) -> None:
    assert turns({"role": "assistant"} | message)[0].content == content


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": []}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": ["x"]}, "messages[0].content[0]"),
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id"),
        ({"role": "function", "content": "x"}, "messages[0].name"),
        ({"role": "wizard", "content": "x"}, "messages[0].role"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls[0].function"),
        ({"role": "assistant", "audio": {"id": "a"}}, "messages[0].audio"),
        ({"role": "assistant", "annotations": [{}]}, "messages[0].annotations"),
    ],
)
def test_a_malformed_message_is_named_by_its_place(message: object, param: str) -> None:
    assert refusal(messages=[message]).fields["param"] == param


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": "x", "mood": "good"}, "messages[0].mood"),
        (
            {"role": "user", "content": [{"type": "text", "text": "x", "size": 1}]},
            "messages[0].content[0].size",
        ),
    ],
)
def test_a_field_of_a_message_that_nobody_knows_is_refused(message: object, param: str) -> None:
    error = refusal(messages=[message])

    assert isinstance(error, UnknownParameter)
    assert error.fields["param"] == param


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_content_that_is_no_text_is_refused_by_name(kind: str) -> None:
    error = refusal(messages=[{"role": "user", "content": [{"type": kind, kind: {}}]}])

    assert isinstance(error, UnsupportedParameter)
    assert error.fields["param"] == "messages[0].content[0].type"


# --- tools ---------------------------------------------------------------------------


def test_tools_reach_the_driver_as_they_were_described() -> None:
    tools = [tool("f", description="adds", parameters=SCHEMA, strict=True), tool("g")]

    assert params(tools=tools).tools == ToolUse(
        tools=(
            ToolSpec(name="f", description="adds", parameters=SCHEMA, strict=True),
            ToolSpec(name="g"),
        ),
        choice="auto",
    )


@pytest.mark.parametrize("choice", ["none", "auto", "required"])
def test_a_choice_in_words_is_passed_on(choice: str) -> None:
    use = params(tools=[tool("f")], tool_choice=choice).tools

    assert use is not None
    assert (use.choice, use.named, use.parallel) == (choice, False, True)


def test_a_function_named_as_a_choice_has_to_be_called_whatever_its_name() -> None:
    choice = {"type": "function", "function": {"name": "auto"}}

    use = params(tools=[tool("f"), tool("auto")], tool_choice=choice).tools

    assert use is not None
    assert (use.choice, use.named) == ("auto", True)


def test_allowed_tools_are_the_only_ones_left() -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "g"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}

    use = params(tools=[tool("f"), tool("g")], tool_choice=choice).tools

    assert use == ToolUse(tools=(ToolSpec(name="g"),), choice="required")


def test_no_tools_are_none() -> None:
    assert params(tools=[], tool_choice="auto").tools is None
    assert params(functions=[], function_call="none").tools is None
    assert params(tool_choice=None, function_call="auto").tools is None


def test_the_default_of_the_other_list_changes_nothing() -> None:
    for harmless in (None, "auto"):
        tools = {"tools": [tool("f")], "tool_choice": "none"}
        functions = {"functions": [{"name": "f"}], "function_call": "none"}
        assert params(**tools, function_call=harmless) == params(**tools)
        assert params(**functions, tool_choice=harmless) == params(**functions)


def test_a_tool_that_is_no_function_is_refused_as_not_implemented() -> None:
    error = refusal(tools=[{"type": "custom", "custom": {"name": "f"}}])

    assert (error.fields["param"], error.code) == ("tools[0].type", "unsupported_parameter")


def test_a_word_that_is_a_kind_elsewhere_is_no_kind_here() -> None:
    error = refusal(reasoning_effort="file")

    assert (error.fields["param"], error.code) == ("reasoning_effort", "invalid_value")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [tool("f"), tool("f")]}, "tools"),
        ({"tools": [tool("a b")]}, "tools[0].function.name"),
        ({"tools": [tool("f")] * 129}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [tool("f", parameters=[])]}, "tools[0].function.parameters"),
        ({"tools": [tool("f", colour="red")]}, "tools[0].function.colour"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [tool("f")], "tool_choice": "some"}, "tool_choice"),
        (
            {"tools": [tool("f")], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
        ),
        (
            {"tools": [tool("f")], "tool_choice": {"type": "custom", "custom": {"name": "f"}}},
            "tool_choice.type",
        ),
        (
            {
                "tools": [tool("f")],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": []},
                },
            },
            "tool_choice",
        ),
        ({"functions": [{"name": "f"}], "tools": [tool("g")]}, "functions"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"functions": [], "function_call": {"name": "f"}}, "function_call"),
        ({"tools": [tool("f")], "function_call": "none"}, "function_call"),
        ({"tools": [tool("f")], "function_call": {"name": "f"}}, "function_call"),
        ({"functions": [{"name": "f"}], "tool_choice": "none"}, "tool_choice"),
        ({"functions": [{"name": "f"}], "tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}], "tool_choice": named("f")}, "tool_choice"),
    ],
)
def test_tools_that_make_no_sense_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    assert refusal(**fields).fields["param"] == param


# --- formats -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "grammar"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, Grammar(kind="json_object")),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, Grammar(kind="json_object")),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}},
            Grammar(
                kind="json_schema",
                source='{"type":"object","properties":{"a":{"type":"integer"}}}',
            ),
        ),
    ],
)
def test_a_format_becomes_a_grammar(form: object, grammar: Grammar | None) -> None:
    assert params(response_format=form).grammar == grammar


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"type": "yaml"}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {}}, "response_format.json_schema.name"),
        (
            {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"title": "x" * MAX_GRAMMAR_BYTES}},
            },
            "response_format.json_schema.schema",
        ),
    ],
)
def test_a_format_that_is_none_is_refused_by_name(form: object, param: str) -> None:
    assert refusal(response_format=form).fields["param"] == param


def test_a_form_goes_together_with_tools() -> None:
    made = params(response_format={"type": "json_object"}, tools=[tool("f")])

    assert made.grammar == Grammar(kind="json_object")
    assert made.tools == ToolUse(tools=(ToolSpec(name="f"),))


# --- combinations and ranges ---------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logit_bias": {"100": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"\u0663": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
        ({"stream": True, "stream_options": {"colour": 1}}, "stream_options.colour"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_refused_by_name(
    fields: dict[str, Any], param: str
) -> None:
    assert refusal(**fields).fields["param"] == param


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", True),
        ("max_tokens", 1.5),
        ("max_tokens", "5"),
        ("max_completion_tokens", 2**31),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", -0.1),
        ("top_p", 1.01),
        ("top_k", -1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("n", 0),
        ("n", 17),
        ("n", True),
        ("logprobs", 1),
        ("top_logprobs", 21),
        ("logit_bias", {"1": 101}),
        ("logit_bias", []),
        ("seed", 2**63),
        ("seed", 1.5),
        ("stop", ["a"] * 5),
        ("stop", ""),
        ("stop", [""]),
        ("stop", [1]),
        ("stop", "x" * 1025),
        ("stream", "false"),
        ("stream", 1),
        ("model", None),
        ("model", 3),
        ("messages", []),
        ("messages", None),
        ("messages", "hello"),
        ("messages", HELLO * 2049),
        ("messages", ["hello"]),
        ("reasoning_effort", "hard"),
        ("service_tier", "flex"),
        ("metadata", {"a": 1}),
        ("user", 5),
    ],
)
def test_a_wrong_type_or_range_names_its_parameter(name: str, value: object) -> None:
    error = refusal(**{name: value})

    assert str(error.fields["param"]).startswith(name)
    assert not isinstance(error, UnsupportedParameter)


@pytest.mark.parametrize(
    ("name", "values"),
    [(name, field.neutral) for name, field in sorted(CHAT_FIELDS.refused.items())],
)
def test_a_value_that_asks_for_nothing_passes(name: str, values: tuple[object, ...]) -> None:
    for value in (None, *values):
        assert params(**{name: value}) == params()


@pytest.mark.parametrize("name", ["api_base", "best_of", "prompt", "echo", "suffix", ""])
def test_fields_that_openai_does_not_know_are_refused(name: str) -> None:
    error = refusal(**{name: None})

    assert isinstance(error, UnknownParameter)
    assert error.fields["param"] == name


@pytest.mark.parametrize("name", ["chat_template", "chat_template_kwargs"])
def test_templates_of_requests_are_refused(name: str) -> None:
    assert isinstance(refusal(**{name: {"a": 1}}), UnsupportedParameter)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nul",
        b"[]",
        b'"x"',
        b"\xff",
        b'{"model": "\xff"}',
        b"{}",
        b"NaN",
        b'{"seed": 1e999}',
        b"[" * 100_000,
    ],
)
def test_a_body_that_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read_request(body, CHAT_FIELDS, ChatRequest)
