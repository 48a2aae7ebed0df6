"""Stop strings in the content that parsers give, also where they look like a mark's beginning."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.text.answers import families
from pals.text.answers.format import AnswerFormat
from pals.text.answers.pieces import Content
from pals.text.answers.reasoning import THINK
from pals.text.stop import StopStrings
from tests.unit.text.answers.reading import TOOLS, cuts_of, format_of, joined

QWEN = format_of(families.HERMES, THINK)
STOPS = ("<tool", "call>", "<", "</think>", "END", "a<t", "\n\n", "ool_")
FRAGMENTS = st.sampled_from(
    ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool", "_call", "END", "E", "ND", "a",
     "\n", " ", '{"name": "now", "arguments": {"a": "END"}}']
)  # fmt: skip


def shown(answers: AnswerFormat, stops: list[str], parts: list[str]) -> str:
    """Return the content that a driver would send: stop strings are looked for in content alone."""
    parser, watcher = answers.parser(TOOLS, prompt_tail=""), StopStrings(stops)
    out = ""
    for pieces in [*map(parser.push, parts), parser.finish()]:
        for piece in pieces:
            if isinstance(piece, Content):
                text, hit = watcher.push(piece.text)
                out += text
                if hit:
                    return out
    return out + watcher.finish()


def whole_content(answers: AnswerFormat, text: str) -> str:
    parser = answers.parser(TOOLS, prompt_tail="")
    pieces = joined([*parser.push(text), *parser.finish()])
    return "".join(part[1] for part in pieces if part[0] == "content")


@settings(max_examples=60)
@given(st.data())
def test_content_ends_before_the_stop_string_that_completes_first(data: st.DataObject):
    stops = data.draw(st.lists(st.sampled_from(STOPS), min_size=1, max_size=4, unique=True))
    text = "".join(data.draw(st.lists(FRAGMENTS, max_size=12)))
    content = whole_content(QWEN, text)
    ends = [(content.find(s) + len(s), -len(s)) for s in stops if s in content]
    expected = content[: min(ends)[0] + min(ends)[1]] if ends else content

    assert shown(QWEN, stops, data.draw(cuts_of(text))) == expected


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("so <tool then", "so "),
        ('so <tool_call>{"name": "now", "arguments": {}}</tool_call>', "so"),
        ("<think>a <tool b</think>c", "c"),
    ],
)
def test_a_stop_string_that_begins_a_mark_is_none_where_the_mark_is_meant(text: str, content: str):
    assert shown(QWEN, ["<tool"], list(text)) == content
