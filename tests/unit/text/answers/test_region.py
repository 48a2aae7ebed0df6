import re

import pytest

from pals.text.answers.json_scan import SPACE
from pals.text.answers.pieces import Content, Piece, ToolArguments, ToolCall
from pals.text.answers.region import (
    MAX_CALLS,
    MAX_HELD_CHARACTERS,
    Calls,
    MalformedCall,
    Region,
    new_call_id,
    read_call,
    text_of_arguments,
    whole_call,
)
from pals.text.answers.source import Reader, ReaderParser, Source

MARKS = ("<end>",)


def read(text: str, body_of: object, *, drop: str = SPACE) -> list[Piece]:
    """Read a text as one call and then whatever follows the mark as content."""
    source = Source()

    def reader() -> Reader[None]:
        region = Region(source, MARKS)
        mark = yield from read_call(region, calls(), body_of(region), drop=drop)  # type: ignore[operator]
        yield Content(f"|{mark}|")

    parser = ReaderParser(source, reader())
    return [*parser.push(text), *parser.finish()]


def calls() -> Calls:
    return Calls({"f": {}}, new_id=lambda: "id")


def test_ids_look_like_those_of_openai():
    ids = {new_call_id() for _ in range(20)}
    assert len(ids) == 20
    assert all(re.fullmatch("call_[A-Za-z0-9]{24}", i) for i in ids)


def test_calls_are_counted_and_only_of_tools_that_are_offered():
    made = calls()
    assert made.open("f") == ToolCall(0, "id", "f")
    assert made.open("f") == ToolCall(1, "id", "f")
    with pytest.raises(MalformedCall):
        made.open("g")


@pytest.mark.parametrize(("several", "most"), [(True, MAX_CALLS), (False, 1)])
def test_an_answer_calls_only_so_often(several: bool, most: int):
    made = Calls({"f": {}}, several=several)
    for _ in range(most):
        assert not made.over
        made.open("f")
    assert made.over
    with pytest.raises(MalformedCall):
        made.open("f")


def test_a_value_is_read_up_to_its_last_character():
    found: list[object] = []

    def body(region: Region) -> Reader[None]:
        for _ in range(4):
            found.append((yield from region.value()))
            yield from region.expect(",")

    read('"a\\n" , {"b": [1]}, -2.5e3,true,<end>', body)
    assert found == ["a\n", {"b": [1]}, -2500.0, True]


@pytest.mark.parametrize("text", ["nul,", "01,", "{1}", '"a', "", "1a,", "[1"])
def test_what_is_no_value_is_malformed_and_told_as_content(text: str):
    def body(region: Region) -> Reader[None]:
        yield from region.value()
        yield from region.expect(",")
        raise AssertionError

    assert read(text + "<end>", body) == [Content(text + "|<end>|")]


def test_what_takes_too_long_to_be_a_call_is_content():
    def body(region: Region) -> Reader[None]:
        yield from region.value()
        raise AssertionError

    text = '"' + "a" * MAX_HELD_CHARACTERS + '"'
    assert read(text + "<end>", body) == [Content(text + "|<end>|")]


def test_arguments_of_any_length_pass_without_being_held():
    source = Source()

    def reader() -> Reader[None]:
        yield from Region(source, MARKS).stream_arguments(ToolCall(0, "id", "f"))

    parser = ReaderParser(source, reader())
    parser.push('{"a": "')
    for _ in range(3):
        assert parser.push("b" * MAX_HELD_CHARACTERS) == [
            ToolArguments(0, "b" * MAX_HELD_CHARACTERS)
        ]
        assert source.text == ""


def test_arguments_that_turn_out_wrong_end_there_and_the_rest_is_content():
    def body(region: Region) -> Reader[None]:
        yield from region.stream_arguments(calls().open("f"))

    assert read('{"a": 1 oh}<end>', body) == [
        ToolCall(0, "id", "f"),
        ToolArguments(0, '{"a": 1 '),
        Content("oh}|<end>|"),
    ]


def test_arguments_that_are_no_object_are_content_as_a_whole():
    def body(region: Region) -> Reader[None]:
        yield from region.stream_arguments(calls().open("f"))

    assert read(" [1]<end>", body) == [Content(" [1]|<end>|")]


def test_what_follows_a_call_is_dropped_if_it_means_nothing():
    def body(region: Region) -> Reader[None]:
        yield from region.expect("x")

    assert read("x } \n<end>", body, drop=SPACE + "}") == [Content("|<end>|")]
    assert read("x }b<end>", body, drop=SPACE + "}") == [Content("b|<end>|")]


@pytest.mark.parametrize(
    ("value", "text"),
    [({"a": "é"}, '{"a": "é"}'), ('{"a": 1}', '{"a": 1}'), (None, "{}"), ("null", "{}")],
)
def test_arguments_that_come_whole_are_an_object_or_hold_one(value: object, text: str):
    assert text_of_arguments(value) == text


@pytest.mark.parametrize("value", [[1], 1, "x", "[1]", True, '"{}"'])
def test_anything_else_is_malformed(value: object):
    with pytest.raises(MalformedCall):
        text_of_arguments(value)


@pytest.mark.parametrize("name", [None, 1, "g"])
def test_a_whole_call_needs_a_name_that_is_known(name: object):
    with pytest.raises(MalformedCall):
        list(whole_call(calls(), name, {}))
