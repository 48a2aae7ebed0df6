import pytest

from pals.text.answers import families
from pals.text.answers.reasoning import THINK
from tests.unit.text.answers.reading import format_of, joined, read

QWEN = format_of(families.HERMES, THINK)


@pytest.mark.parametrize(
    ("tail", "text", "parts"),
    [
        ("", "<think>\na\n</think>\n\nb", [("reasoning", "a"), ("content", "b")]),
        ("", "\n\n<think>a</think>b", [("reasoning", "a"), ("content", "b")]),
        ("", "b", [("content", "b")]),
        ("", " b\n", [("content", " b\n")]),
        ("", "b <think>c</think>", [("content", "b <think>c</think>")]),
        ("", "<think>a", [("reasoning", "a")]),
        ("", "<thin", [("content", "<thin")]),
        ("", "<think></think>", []),
        ("<think>\n", "a</think>b", [("reasoning", "a"), ("content", "b")]),
        ("<think>\n", "<think>\na</think>b", [("reasoning", "a"), ("content", "b")]),
        ("<think>", "a\n</thin", [("reasoning", "a\n</thin")]),
        ("<think>\n\n</think>\n\n", "b</think>c", [("content", "b</think>c")]),
        ("I write <think> a lot", "b", [("content", "b")]),
    ],
)
def test_reasoning_is_what_stands_between_the_marks_at_the_beginning(
    tail: str, text: str, parts: list[tuple[str, str]]
):
    assert joined(read(QWEN, list(text), use=None, prompt_tail=tail)) == parts


def test_without_marks_in_the_template_there_is_no_reasoning():
    text = "<think>a</think>b"
    assert joined(read(format_of(families.HERMES), [text], use=None)) == [("content", text)]


def test_text_after_the_reasoning_comes_at_once():
    parser = QWEN.parser(None, prompt_tail="<think>\n")
    parser.push("a</think>\n\n")
    assert joined(parser.push("b ")) == [("content", "b ")]
