import pytest

from pals.text.answers import families
from pals.text.answers.harmony import MAX_HEAD_CHARACTERS
from tests.unit.text.answers.reading import format_of, joined, read

ANSWERS = format_of(families.HARMONY, special=families.HARMONY.marks)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<|channel|>final<|message|>a", [("content", "a")]),
        ('<|channel|>final <|constrain|>json<|message|>{"a": 1}', [("content", '{"a": 1}')]),
        ("<|channel|>analysis<|message|>a", [("reasoning", "a")]),
        ("no head at all", [("content", "no head at all")]),
        ("a" * (2 * MAX_HEAD_CHARACTERS), [("content", "a" * (2 * MAX_HEAD_CHARACTERS))]),
        ("<|channel|>final", [("content", "final")]),
        ("<|end|><|channel|>final<|message|>b", [("content", "b")]),
        ("<|channel|>final<|message|>a<|return|>b", [("content", "a")]),
        (
            "<|channel|>commentary to=functions.unknown<|message|>{}<|call|>",
            [("content", "{}")],
        ),
        (
            "<|channel|>commentary to=functions.now<|message|>no<|call|>",
            [("content", "no")],
        ),
        (
            "<|channel|>analysis to=python<|message|>print()<|call|>",
            [("reasoning", "print()")],
        ),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>"
            "b<|end|><|start|>assistant<|channel|>final<|message|>c",
            [("reasoning", "a\n\nb"), ("content", "c")],
        ),
    ],
)
def test_messages_are_told_apart_by_their_channels(text: str, parts: list[tuple[str, str]]):
    assert joined(read(ANSWERS, [text])) == joined(read(ANSWERS, list(text))) == parts


def test_a_call_is_content_where_no_tools_are_offered():
    text = '<|channel|>commentary to=functions.now<|message|>{"a": 1}<|call|>'
    assert joined(read(ANSWERS, [text], use=None)) == [("content", '{"a": 1}')]


def test_an_answer_is_over_when_it_hands_over_to_a_tool():
    parser = ANSWERS.parser(None, prompt_tail="")
    parser.push("<|channel|>final<|message|>a")
    assert not parser.ended
    parser.push("<|call|>")
    assert parser.ended


def test_text_comes_while_it_is_written():
    parser = ANSWERS.parser(None, prompt_tail="")
    parser.push("<|channel|>final<|message|>")
    assert joined(parser.push("one")) == [("content", "one")]
    assert joined(parser.push(" two")) == [("content", " two")]
