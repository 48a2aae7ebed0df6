from __future__ import annotations

import msgspec
import pytest

from pals.api.openai.parse import (
    NEUTRAL_VALUES,
    WITHOUT_EFFECT,
    conversation,
    generate_params,
    parse_request,
)
from pals.api.openai.schema import ChatRequest
from pals.driver.interface import GenerateParams, Message
from pals.errors import InvalidRequest, UnknownParameter, UnsupportedParameter

HELLO = [{"role": "user", "content": "hello"}]


def parse(**fields: object) -> ChatRequest:
    return parse_request(msgspec.json.encode({"model": "m", "messages": HELLO} | fields))


def test_least_request_has_openai_defaults() -> None:
    request = parse()

    assert generate_params(request) == GenerateParams(
        max_tokens=None, temperature=1.0, top_p=1.0, seed=None, stop=()
    )
    assert conversation(request) == [Message(role="user", content="hello")]
    assert not request.stream


def test_every_implemented_option_reaches_the_driver() -> None:
    request = parse(
        max_completion_tokens=5, temperature=0, top_p=0.5, seed=-3, stop=["a", "b"], stream=True
    )

    assert generate_params(request) == GenerateParams(
        max_tokens=5, temperature=0.0, top_p=0.5, seed=-3, stop=("a", "b")
    )


def test_explicit_nulls_mean_defaults() -> None:
    names = (
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "stream",
    )

    request = parse(**dict.fromkeys(names), stream_options=None)

    assert generate_params(request) == GenerateParams()


def test_a_single_stop_string_is_a_list_of_one() -> None:
    assert generate_params(parse(stop="\n")).stop == ("\n",)


def test_equal_token_limits_under_both_names_are_accepted() -> None:
    assert generate_params(parse(max_tokens=9, max_completion_tokens=9)).max_tokens == 9


def test_text_parts_become_lines() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]

    request = parse(messages=[{"role": "user", "content": parts}])

    assert conversation(request)[0].content == "one\ntwo"


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
def test_every_role_of_openai_is_passed_on(role: str) -> None:
    request = parse(messages=[{"role": role, "content": "x"}])

    assert conversation(request) == [Message(role=role, content="x")]


def test_an_assistant_turn_may_have_null_content() -> None:
    request = parse(messages=[*HELLO, {"role": "assistant", "content": None, "tool_calls": []}])

    assert conversation(request)[1] == Message(role="assistant", content="")


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_labels_are_accepted(name: str) -> None:
    parse(**{name: "x"})


@pytest.mark.parametrize("name", sorted(NEUTRAL_VALUES))
def test_an_option_that_is_not_implemented_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        parse(**{name: {"some": "value"}})

    assert caught.value.fields["param"] == name
    assert caught.value.http_status == 400


@pytest.mark.parametrize(
    ("name", "value"),
    [(n, v) for n, values in sorted(NEUTRAL_VALUES.items()) for v in (None, *values)],
)
def test_a_value_that_asks_for_nothing_passes(name: str, value: object) -> None:
    parse(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("n", True),
        ("n", 0),
        ("logprobs", True),
        ("logprobs", 0),
        ("presence_penalty", 0.1),
        ("frequency_penalty", -1),
        ("response_format", {"type": "json_object"}),
        ("tools", [{"type": "function"}]),
        ("store", True),
        ("service_tier", "flex"),
    ],
)
def test_a_value_that_asks_for_something_is_refused(name: str, value: object) -> None:
    with pytest.raises(UnsupportedParameter):
        parse(**{name: value})


@pytest.mark.parametrize("name", ["top_k", "api_base", "best_of", "prompt", "min_p", "echo", ""])
def test_fields_that_openai_does_not_know_are_refused(name: str) -> None:
    with pytest.raises(UnknownParameter) as caught:
        parse(**{name: None})

    assert caught.value.fields["param"] == name


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
        ("top_p", 0),
        ("top_p", 1.01),
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
    ],
)
def test_a_wrong_type_or_range_names_its_parameter(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(**{name: value})

    assert str(caught.value.fields["param"]).startswith(name)
    assert not isinstance(caught.value, UnsupportedParameter)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0]"),
        ({"role": "user", "content": ["x"]}, "messages[0].content[0]"),
        ({"role": "wizard", "content": "x"}, "messages[0].role"),
        ({"content": "x"}, "messages[0]"),
    ],
)
def test_a_malformed_message_is_named_by_its_place(message: object, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(messages=[message])

    assert caught.value.fields["param"] == param


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": "x", "name": "bob"}, "messages[0].name"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0].type",
        ),
    ],
)
def test_message_parts_that_are_not_implemented_are_refused_by_name(
    message: object, param: str
) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        parse(messages=[message])

    assert caught.value.fields["param"] == param


def test_stream_options_need_a_stream() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(stream_options={"include_usage": True})

    assert caught.value.fields["param"] == "stream_options"


def test_obfuscation_of_a_stream_is_refused() -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        parse(stream=True, stream_options={"include_obfuscation": True})

    assert caught.value.fields["param"] == "stream_options.include_obfuscation"


def test_different_token_limits_are_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(max_tokens=5, max_completion_tokens=6)

    assert caught.value.fields["param"] == "max_tokens"


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
    ],
)
def test_a_body_that_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse_request(body)
