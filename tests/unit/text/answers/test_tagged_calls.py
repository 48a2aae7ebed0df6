import json
from dataclasses import replace

import pytest

from pals.text.answers import families
from pals.text.answers.tools import ToolSpec, ToolUse
from tests.unit.text.answers.reading import TOOLS, format_of, joined, read

GLM = format_of(families.GLM)
QWEN = format_of(families.QWEN_CODER)


def use_of(schema: object) -> ToolUse:
    parameters = {"type": "object", "properties": {"x": schema}}
    return replace(TOOLS, tools=(ToolSpec(name="f", parameters=parameters),))


def glm(value: str) -> str:
    return f"<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>"


def qwen(value: str) -> str:
    value = f"<parameter=x>\n{value}\n</parameter>"
    return f"<tool_call>\n<function=f>\n{value}\n</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "7", "7"),
        ({"type": "string"}, 'a "b"\n\\c', 'a "b"\n\\c'),
        ({"type": "string"}, "", ""),
        ({"type": "integer"}, "7", 7),
        ({"type": "boolean"}, "True", True),
        ({"type": "array"}, "[1, 2]", [1, 2]),
        ({"type": "object"}, '{"a": null}', {"a": None}),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "12", "12"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "12", 12),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "true", "true"),
        ({"type": "integer"}, "many", "many"),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "array"}, '["\\ud800"]', ["\ud800"]),
        ({}, "[1", "[1"),
        ({}, "1", 1),
    ],
)
@pytest.mark.parametrize("write", [glm, qwen])
def test_a_value_has_the_type_that_its_schema_wants(
    write: object, schema: object, text: str, value: object
):
    answers = GLM if write is glm else QWEN
    parts = joined(read(answers, [write(text)], use_of(schema)))  # type: ignore[operator]
    assert parts[0] == ("call", "0", "f")
    assert json.loads(parts[1][1].encode()) == {"x": value}


def test_only_the_line_feeds_next_to_the_tags_are_the_tags():
    parts = joined(read(QWEN, list(qwen("\na\n")), use_of({"type": "string"})))
    assert json.loads(parts[1][1]) == {"x": "\na\n"}


def test_a_text_streams_while_it_is_written():
    parser = QWEN.parser(use_of({"type": "string"}), prompt_tail="")
    parser.push("<tool_call>\n<function=f>\n<parameter=x>\n")
    assert joined(parser.push('one "')) == [("arguments 0", 'one \\"')]
    assert joined(parser.push("two\n</para")) == [("arguments 0", "two")]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>unknown\n</tool_call>",
        "<tool_call>who is it</tool_call>",
        '<tool_call>{"name": "f"}</tool_call>',
        "<tool_call>f",
    ],
)
def test_a_malformed_call_of_glm_is_content(text: str):
    body = text.removeprefix("<tool_call>").removesuffix("</tool_call>").rstrip()
    assert joined(read(GLM, [text], use_of({}))) == [("content", body)]


def test_a_key_without_a_value_ends_the_call():
    text = "<tool_call>f\n<arg_key>x</arg_key>\nno</tool_call>after"
    assert joined(read(GLM, [text], use_of({}))) == [("call", "0", "f"), ("content", "x\nnoafter")]


@pytest.mark.parametrize(
    "body", ["f()", "<function=unknown>\n</function>", "<parameter=x>\n1\n</parameter>"]
)
def test_a_malformed_call_of_qwen_is_content(body: str):
    parts = joined(read(QWEN, [f"<tool_call>\n{body}\n</tool_call>"], use_of({})))
    assert [part[0] for part in parts] == ["content"]


def test_arguments_that_break_off_are_not_closed():
    text = "<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1"
    parts = joined(read(GLM, [text], use_of({"type": "integer"})))
    assert parts[1] == ("arguments 0", '{"x": ')
