"""Each family's answers, streamed as models stream them and cut in every other way."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.text.answers import families
from pals.text.answers.format import AnswerFormat
from pals.text.answers.pieces import Content, Reasoning, ToolArguments
from tests.unit.text.answers.reading import TOOLS, cuts_of, format_of, joined, read
from tests.unit.text.answers.transcripts import TRANSCRIPTS, Transcript

NAMES = list(TRANSCRIPTS)
EVERY_MARK = sorted({mark for family in families.FAMILIES for mark in family.marks})


def answers_of(transcript: Transcript) -> AnswerFormat:
    return format_of(transcript.family, transcript.thinking, transcript.special)


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_streamed_character_by_character_is_what_it_consists_of(name: str):
    transcript = TRANSCRIPTS[name]

    pieces = read(answers_of(transcript), list(transcript.text), prompt_tail=transcript.prompt_tail)

    assert joined(pieces) == transcript.parts


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10)
@given(data=st.data())
def test_no_cut_of_an_answer_changes_it(name: str, data: st.DataObject):
    transcript = TRANSCRIPTS[name]
    parts = data.draw(cuts_of(transcript.text))

    pieces = read(answers_of(transcript), parts, prompt_tail=transcript.prompt_tail)

    assert joined(pieces) == transcript.parts


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10)
@given(data=st.data())
def test_an_answer_that_breaks_off_is_read_alike_however_it_is_cut(name: str, data: st.DataObject):
    transcript = TRANSCRIPTS[name]
    text = transcript.text[: data.draw(st.integers(0, len(transcript.text)))]
    whole = read(answers_of(transcript), [text], prompt_tail=transcript.prompt_tail)

    pieces = read(
        answers_of(transcript), data.draw(cuts_of(text)), prompt_tail=transcript.prompt_tail
    )

    assert joined(pieces) == joined(whole)


FRAGMENTS = st.sampled_from(
    [
        *EVERY_MARK, "<think>", "</think>", "[THINK]", "[/THINK]", "{", "}", "[", "]", '"', ":",
        ",", ";", "```json\n", "\n", " ", "get_weather", "now", '"name"', '"arguments"',
        '"parameters"', '{"name": "now", "arguments": {}}', '{"city": "x"}', "function", "\\",
        "city", "assistant", "analysis", "final", "commentary", " to=functions.now ", "a", "<", "1",
        "<function=now>", "<parameter=city>", "</parameter>", "</function>", "\u00e9",
    ]
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10)
@given(data=st.data())
def test_no_cut_of_any_text_changes_what_is_read_and_no_special_token_is_shown(
    name: str, data: st.DataObject
):
    transcript = TRANSCRIPTS[name]
    text = "".join(data.draw(st.lists(FRAGMENTS, max_size=25)))
    whole = joined(read(answers_of(transcript), [text], prompt_tail=transcript.prompt_tail))

    pieces = read(
        answers_of(transcript), data.draw(cuts_of(text)), prompt_tail=transcript.prompt_tail
    )

    assert joined(pieces) == whole
    shown = "".join(p.text for p in pieces if isinstance(p, Content | Reasoning))
    assert not any(mark in shown for mark in transcript.special)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10)
@given(data=st.data())
def test_a_mark_is_never_shown_in_part_while_it_is_written(name: str, data: st.DataObject):
    """What came out by any place is what comes out of the text without the mark begun there."""
    transcript = TRANSCRIPTS[name]
    at = data.draw(st.integers(0, len(transcript.text)))
    parser = answers_of(transcript).parser(TOOLS, prompt_tail=transcript.prompt_tail)

    early = joined(parser.push(transcript.text[:at]))

    assert [part[0] for part in early] == [part[0] for part in transcript.parts[: len(early)]]
    for part, final in zip(early, transcript.parts, strict=False):
        assert final[-1].startswith(part[-1])


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_json_objects(name: str):
    transcript = TRANSCRIPTS[name]
    for part in transcript.parts:
        if part[0].startswith("arguments"):
            assert isinstance(json.loads(part[1]), dict)


@pytest.mark.parametrize(
    "name", ["qwen 3: thinks, speaks, calls twice", "gpt-oss: analysis, preamble, call"]
)
def test_arguments_come_while_they_are_written(name: str):
    transcript = TRANSCRIPTS[name]
    pieces = read(answers_of(transcript), list(transcript.text), prompt_tail=transcript.prompt_tail)

    assert sum(isinstance(p, ToolArguments) and p.index == 0 for p in pieces) > 10
