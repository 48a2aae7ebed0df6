from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from pals.api.openai.completion_form import CompletionForm
from pals.api.openai.completions import completion_params
from pals.api.openai.fields import COMPLETION_FIELDS
from pals.api.openai.prompts import read_prompts
from pals.api.openai.reading import read_request
from pals.api.openai.schema.completions import CompletionRequest
from pals.driver.interface import Delta, GenerateParams, TokenScore, TopScore
from pals.errors import InvalidRequest, UnsupportedParameter
from pals.text.answers.pieces import Content
from tests.openai_schema import component, problems
from tests.unit.api.openai.test_chat_form import USAGE

VOCAB = 100
EURO = "€".encode()


def parse(**fields: object) -> CompletionRequest:
    body = msgspec.json.encode({"model": "m", "prompt": "hi"} | fields)
    return read_request(body, COMPLETION_FIELDS, CompletionRequest)


def params(**fields: object) -> GenerateParams:
    return completion_params(parse(**fields), vocab_size=VOCAB)


def score(raw: bytes, logprob: float = -1.0, **fields: Any) -> TokenScore:
    return TokenScore(token=1, raw=raw, logprob=logprob, **fields)


def whole(deltas: Sequence[Delta], choices: int = 1, **fields: object) -> dict[str, Any]:
    answer = CompletionForm(parse(**fields), choices=choices).whole(deltas, USAGE)
    return json.loads(msgspec.json.encode(answer))


def test_least_request_has_openai_defaults() -> None:
    assert params() == GenerateParams(max_tokens=16)
    assert params(max_tokens=None, best_of=0, echo=None) == GenerateParams(max_tokens=16)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 17}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"echo": 1}, "echo"),
        ({"stream_options": {}}, "stream_options"),
    ],
)
def test_fields_out_of_range_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        params(**fields)

    assert caught.value.fields["param"] == param


def test_a_suffix_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        params(suffix="end")

    assert caught.value.fields["param"] == "suffix"


# --- prompts -------------------------------------------------------------------------


def prompts(value: object, limit: int = 3) -> list[Any]:
    return read_prompts(value, param="prompt", vocab_size=VOCAB, limit=limit)


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("hi", ["hi"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 99], [(1, 99)]),
        ([[1], [2, 3]], [(1,), (2, 3)]),
        ([1] * 50, [(1,) * 50]),
    ],
)
def test_prompts_are_texts_or_tokens_or_lists_of_either(value: object, read: list[Any]) -> None:
    assert prompts(value) == read


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ([], "prompt"),
        (5, "prompt"),
        ({}, "prompt"),
        (True, "prompt"),
        ([True], "prompt[0]"),
        ([1, 100], "prompt"),
        ([-1], "prompt"),
        ([1.5], "prompt[0]"),
        ([1, "a"], "prompt[0]"),
        ([[1], []], "prompt[1]"),
        ([[1], [100]], "prompt[1]"),
        (["a", 1], "prompt[0]"),
        ([None], "prompt[0]"),
        (["a"] * 4, "prompt"),
        ([[1]] * 4, "prompt"),
    ],
)
def test_what_is_no_prompt_is_refused_by_its_place(value: object, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        prompts(value)

    assert caught.value.fields["param"] == param


# --- answers -------------------------------------------------------------------------


def test_text_of_all_deltas_is_the_answer_to_each_prompt() -> None:
    answer = whole(
        [
            Delta(choice=1, pieces=(Content("b"),), finish_reason="stop"),
            Delta(choice=0, pieces=(Content("a"),)),
            Delta(choice=0, pieces=(Content("!"),), finish_reason="length"),
        ],
        choices=2,
    )

    assert answer["choices"] == [
        {"index": 0, "text": "a!", "logprobs": None, "finish_reason": "length"},
        {"index": 1, "text": "b", "logprobs": None, "finish_reason": "stop"},
    ]
    assert answer["object"] == "text_completion"
    assert problems(answer, component("CreateCompletionResponse")) == []


ECHO = [
    Delta(
        pieces=(Content("Hi"),),
        scores=(score(b"<s>", scored=False, hidden=True), score(b" Hi", -2.0)),
    ),
    Delta(scores=(score(EURO[:2]),)),
    Delta(pieces=(Content("€"),), scores=(score(EURO[2:]),)),
    Delta(pieces=(Content(" x"),), scores=(score(b" x"),), finish_reason="stop"),
]


def test_scores_have_the_older_form_with_offsets_of_characters() -> None:
    [choice] = whole(ECHO, logprobs=0, echo=True)["choices"]

    assert choice["text"] == "Hi€ x"
    assert choice["logprobs"] == {
        "tokens": ["<s>", " Hi", "bytes:\\xe2\\x82", "bytes:\\xac", " x"],
        "token_logprobs": [None, -2.0, -1.0, -1.0, -1.0],
        "top_logprobs": [
            None,
            {" Hi": -2.0},
            {"bytes:\\xe2\\x82": -1.0},
            {"bytes:\\xac": -1.0},
            {" x": -1.0},
        ],
        "text_offset": [0, 0, 2, 2, 3],
    }


def test_offsets_go_on_from_chunk_to_chunk() -> None:
    form = CompletionForm(parse(logprobs=0, stream=True), choices=1)

    chunks = [chunk for delta in ECHO for chunk in form.chunks(delta)]

    offsets = [chunk.choices[0].logprobs.text_offset for chunk in chunks]
    assert offsets == [[0, 0], [2], [2], [3]]
    assert [chunk.choices[0].text for chunk in chunks] == ["Hi", "", "€", " x"]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, "stop"]


def test_a_token_that_is_none_of_the_likeliest_is_named_too() -> None:
    top = (TopScore(token=2, raw=b"b", logprob=-0.1), TopScore(token=3, raw=b"b", logprob=-0.2))

    [choice] = whole([Delta(scores=(score(b"a", -7.0, top=top),))], logprobs=2)["choices"]

    assert choice["logprobs"]["top_logprobs"] == [{"b": -0.1, "a": -7.0}]


def test_a_delta_without_anything_is_no_chunk() -> None:
    form = CompletionForm(parse(stream=True), choices=1)

    assert form.chunks(Delta()) == []
    assert form.usage_chunk(USAGE) is None


def test_usage_of_a_stream_comes_with_its_last_chunk() -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    form = CompletionForm(parse(**options), choices=1)

    last = form.usage_chunk(USAGE)

    assert last is not None
    assert last.usage == USAGE
    assert [chunk.usage for chunk in form.chunks(Delta(pieces=(Content("a"),)))] == [None]
    assert (
        problems(json.loads(msgspec.json.encode(last)), component("CreateCompletionResponse")) == []
    )
