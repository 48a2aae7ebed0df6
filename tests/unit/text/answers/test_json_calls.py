"""What the transcripts do not show: calls that are none, and calls that are nearly right."""

from dataclasses import replace

import pytest

from pals.text.answers import families
from pals.text.answers.json_calls import DEEPSEEK_CALL, DEEPSEEK_CALL_END, DEEPSEEK_SEPARATOR
from tests.unit.text.answers.reading import TOOLS, format_of, joined, read

HERMES = format_of(families.HERMES)
LLAMA = format_of(families.LLAMA, special=("<|python_tag|>",))
MISTRAL = format_of(families.MISTRAL, special=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"))
DEEPSEEK = format_of(families.DEEPSEEK)
NOW = [("call", "0", "now"), ("arguments 0", "{}")]


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "unknown", "arguments": {}}',
        '{"name": "now", "arguments": [1]}',
        '{"name": "now", "arguments": "no"}',
        '{"name": 7, "arguments": {}}',
        '{"arguments": {}}',
        '{"name": "now", "other": 1}',
        '{"name": "now" "arguments": {}}',
        '{"name": "no',
        "{}",
        "[]",
        "now()",
        '{"name": "now", "arguments": nul}',
    ],
)
def test_a_malformed_call_is_content(body: str):
    text = f"<tool_call>\n{body}\n</tool_call>"
    assert joined(read(HERMES, [text])) == [("content", f"\n{body}")]


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "now", "arguments": {}',
        '{"name": "now", "arguments": {}}}',
        '{"name": "now", "parameters": {}}',
        '{"name": "now"}',
        '{"name": "now", "arguments": null}',
        '{"name": "now", "arguments": "{}"}',
        '{"type": "function", "id": "x", "name": "now", "arguments": {}}',
        '{"arguments": {}, "name": "now"}',
    ],
)
def test_a_call_that_is_nearly_right_is_taken(body: str):
    text = f"<tool_call>\n{body}\n</tool_call>"
    assert joined(read(HERMES, [text])) == NOW


def test_text_goes_on_after_a_call():
    text = 'a\n<tool_call>{"name": "now", "arguments": {}}</tool_call>\n b'
    assert joined(read(HERMES, [text])) == [("content", "a"), *NOW, ("content", "b")]


def test_a_call_goes_on_to_count_after_a_malformed_one():
    text = '<tool_call>oh</tool_call><tool_call>{"name": "now", "arguments": {}}</tool_call>'
    assert joined(read(HERMES, [text])) == [("content", "oh"), *NOW]


def test_a_call_that_breaks_off_has_the_arguments_that_were_written():
    text = '<tool_call>{"name": "get_weather", "arguments": {"city": "Pa'
    assert joined(read(HERMES, [text])) == [
        ("call", "0", "get_weather"),
        ("arguments 0", '{"city": "Pa'),
    ]


def test_the_end_mark_ends_a_call_also_inside_of_a_string():
    text = '<tool_call>{"name": "now", "arguments": {"a": "</tool_call>b'
    assert joined(read(HERMES, [text])) == [
        ("call", "0", "now"),
        ("arguments 0", '{"a": "'),
        ("content", "b"),
    ]


@pytest.mark.parametrize("family", [*families.FAMILIES, families.PLAIN])
def test_an_answer_that_may_call_once_is_over_after_the_call(family: families.Family):
    answers = format_of(family, special=families.HARMONY.marks)
    syntax, arguments = family.syntax, "" if family.syntax.tags else "{}"
    call = syntax.name + "now" + syntax.arguments + arguments + syntax.end
    parser = answers.parser(replace(TOOLS, parallel=False), prompt_tail="")

    pieces = parser.push(syntax.before + call)

    assert parser.ended
    assert joined([*pieces, *parser.push(call), *parser.finish()]) == NOW


@pytest.mark.parametrize("family", [*families.FAMILIES, families.PLAIN])
def test_endless_white_space_in_a_call_is_let_out_within_a_bound(family: families.Family):
    parser = format_of(family).parser(TOOLS, prompt_tail="")
    parser.push(family.syntax.before + family.syntax.name)
    held = [len(parser.push(" " * 10_000)) for _ in range(10)]
    assert any(held[-3:])


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "unknown", "parameters": {}}',
        '  {"a": 1}',
        "```json\n[1]\n```",
        "```",
        "I would call now().",
        '[{"name": "now", "parameters": {}}]',
    ],
)
def test_an_answer_of_llama_that_is_no_call_is_content_to_the_letter(text: str):
    assert joined(read(LLAMA, [text])) == [("content", text)]


def test_text_after_a_bare_call_is_content():
    text = '{"name": "now", "parameters": {}}\nDone.'
    assert joined(read(LLAMA, [text])) == [*NOW, ("content", "Done.")]


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("[TOOL_CALLS]who[ARGS]{}", "who{}"),
        ("[TOOL_CALLS]now {}", "now {}"),
        ("[TOOL_CALLS]now[ARGS]no", "nowno"),
        ('[TOOL_CALLS][{"name": "who"}]', '[{"name": "who"}]'),
        ("[TOOL_CALLS]", ""),
    ],
)
def test_a_malformed_call_of_mistral_is_content(text: str, content: str):
    assert joined(read(MISTRAL, [text])) == ([("content", content)] if content else [])


def test_a_deepseek_call_without_a_separator_is_content():
    text = f"{DEEPSEEK_CALL}now{DEEPSEEK_CALL_END}"
    assert joined(read(DEEPSEEK, [text])) == [("content", "now")]
    text = f"{DEEPSEEK_CALL}function{DEEPSEEK_SEPARATOR}now\n```py\n1\n```{DEEPSEEK_CALL_END}"
    assert joined(read(DEEPSEEK, [text])) == [("content", "functionnow\n```py\n1\n```")]
