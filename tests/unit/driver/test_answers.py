from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.driver.answers import AnswerReader, Reading
from pals.driver.interface import Delta
from pals.driver.state import SampledToken
from pals.text.answers.format import PlainParser
from pals.text.answers.pieces import Content, Piece, Reasoning, ToolArguments, ToolCall
from pals.text.tokenizer import Tokenizer
from tests.unit.driver.local_world import eos_of, ids_of, joined, text_of
from tests.unit.text.tokenizers_for_tests import save_byte_level, save_sentencepiece


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = save_byte_level(tmp_path_factory.mktemp("tokenizer"))
    return Tokenizer.load(folder)


def play(
    tokenizer: Tokenizer, tokens: Sequence[int], *stops: str, last: int | None = None
) -> list[Delta]:
    """Push tokens until a delta is the last one; ``last`` is where the tail stops itself."""
    reading = Reading(tokenizer=tokenizer, end_tokens=frozenset([eos_of(tokenizer)]), stop=stops)
    reader = AnswerReader(0, reading, PlainParser())
    deltas: list[Delta] = []
    for index, token in enumerate(tokens):
        deltas.append(reader.push(SampledToken(token, index == last)))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


def test_each_token_gives_its_text_at_once(tokenizer: Tokenizer) -> None:
    tokens = ids_of(tokenizer, "hey")
    assert play(tokenizer, tokens) == [
        Delta(pieces=(Content("h"),)),
        Delta(pieces=(Content("e"),)),
        Delta(pieces=(Content("y"),)),
    ]


def test_end_token_ends_the_text_and_is_not_shown(tokenizer: Tokenizer) -> None:
    tokens = [*ids_of(tokenizer, "hey"), eos_of(tokenizer)]
    for last in (None, 3):
        deltas = play(tokenizer, tokens, last=last)
        assert joined(deltas) == ("hey", "stop")
        assert text_of(deltas[-1]) == ""


def test_last_token_of_another_kind_ends_the_text_by_length(tokenizer: Tokenizer) -> None:
    assert joined(play(tokenizer, ids_of(tokenizer, "hey"), last=2)) == ("hey", "length")


def test_stop_string_ends_the_text_before_it(tokenizer: Tokenizer) -> None:
    tokens = ids_of(tokenizer, "so END more")
    deltas = play(tokenizer, tokens, "END")
    assert joined(deltas) == ("so ", "stop")
    assert len(deltas) == 6


def test_stop_string_on_the_last_token_is_a_stop(tokenizer: Tokenizer) -> None:
    assert joined(play(tokenizer, ids_of(tokenizer, "so END"), "END", last=5)) == ("so ", "stop")


@pytest.mark.parametrize("ends_by", ["length", "stop"])
def test_beginning_of_a_stop_string_at_the_end_is_shown(tokenizer: Tokenizer, ends_by: str) -> None:
    tokens = ids_of(tokenizer, "so EN")
    if ends_by == "stop":
        tokens.append(eos_of(tokenizer))
    assert joined(play(tokenizer, tokens, "END", last=len(tokens) - 1)) == ("so EN", ends_by)


def test_character_that_the_end_cuts_is_shown_as_a_replacement(tokenizer: Tokenizer) -> None:
    tokens = ids_of(tokenizer, "a€")[:-1]
    assert joined(play(tokenizer, tokens, last=len(tokens) - 1)) == ("a\ufffd", "length")
    assert joined(play(tokenizer, tokens, "\ufffd", last=len(tokens) - 1)) == ("a", "stop")
    assert joined(play(tokenizer, [*tokens, eos_of(tokenizer)], "\ufffd")) == ("a", "stop")


@given(st.data())
def test_text_is_that_of_all_tokens_up_to_the_first_stop(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    letters = ids_of(tokenizer, "ab€")
    tokens = data.draw(st.lists(st.sampled_from(letters), min_size=1, max_size=12))
    stops = data.draw(st.lists(st.text("ab€\ufffd", min_size=1, max_size=3), max_size=2))
    ends_by_token = data.draw(st.booleans())
    text, reason = tokenizer.decode(tokens), "stop" if ends_by_token else "length"
    for end in range(1, len(text) + 1):
        if ending := [stop for stop in stops if text[:end].endswith(stop)]:
            text, reason = text[: end - max(map(len, ending))], "stop"
            break
    stream = [*tokens, eos_of(tokenizer)] if ends_by_token else tokens
    deltas = play(tokenizer, stream, *stops, last=len(stream) - 1)
    assert joined(deltas) == (text, reason)
    assert all(delta.finish_reason is None for delta in deltas[:-1])


# --- scores --------------------------------------------------------------------------


def scored(tokenizer: Tokenizer, tokens: Sequence[int], *stops: str) -> list[Delta]:
    """Push tokens, the last of which the tail stops at."""
    ends = frozenset([eos_of(tokenizer)])
    reading = Reading(tokenizer=tokenizer, end_tokens=ends, stop=stops, scored=True)
    reader = AnswerReader(0, reading, PlainParser())
    deltas: list[Delta] = []
    for index, token in enumerate(tokens, start=1):
        deltas.append(reader.push(SampledToken(token, index == len(tokens), -float(index))))
        if reader.finished:
            break
    return deltas


def raws(deltas: Sequence[Delta]) -> list[list[bytes]]:
    return [[score.raw for score in delta.scores] for delta in deltas]


def test_each_score_comes_with_its_text(tokenizer: Tokenizer) -> None:
    deltas = scored(tokenizer, ids_of(tokenizer, "hey"))

    assert raws(deltas) == [[b"h"], [b"e"], [b"y"]]
    assert [s.logprob for delta in deltas for s in delta.scores] == [-1.0, -2.0, -3.0]


def test_scores_of_a_character_of_several_tokens_come_with_the_character(
    tokenizer: Tokenizer,
) -> None:
    deltas = scored(tokenizer, ids_of(tokenizer, "a€b"))

    assert [text_of(delta) for delta in deltas] == ["a", "", "€", "b"]
    assert raws(deltas)[1] == []
    assert b"".join(raws(deltas)[2]) == "€".encode()


def test_no_score_tells_of_a_stop_string(tokenizer: Tokenizer) -> None:
    deltas = scored(tokenizer, ids_of(tokenizer, "so END"), "END")

    assert raws(deltas) == [[b"s"], [b"o"], [b" "], [], [], []]


def test_no_score_tells_of_a_stop_string_within_a_character(tokenizer: Tokenizer) -> None:
    deltas = scored(tokenizer, ids_of(tokenizer, "a€"), "€")

    assert raws(deltas) == [[b"a"], [], []]


def test_scores_that_were_held_for_a_stop_string_come_when_it_is_none(
    tokenizer: Tokenizer,
) -> None:
    deltas = scored(tokenizer, [*ids_of(tokenizer, "EN"), eos_of(tokenizer)], "END")

    assert joined(deltas) == ("EN", "stop")
    assert raws(deltas) == [[], [], [b"E", b"N"]]


# --- what models write beside text ---------------------------------------------------


class ScriptedParser:
    """Gives the pieces of a script, one entry a push."""

    def __init__(self, *script: list[Piece]) -> None:
        self._script = list(script)
        self.texts: list[str] = []
        self.ended = False

    def push(self, text: str) -> list[Piece]:
        self.texts.append(text)
        return self._script.pop(0) if text and self._script else []

    def finish(self) -> list[Piece]:
        return [piece for pieces in self._script for piece in pieces]


def read(
    tokenizer: Tokenizer,
    parser: ScriptedParser,
    text: str,
    *stops: str,
    kept: frozenset[int] = frozenset(),
    end: bool = True,
) -> tuple[AnswerReader, list[Delta]]:
    ends = frozenset([eos_of(tokenizer)])
    reading = Reading(tokenizer=tokenizer, end_tokens=ends, kept_tokens=kept, stop=stops)
    reader = AnswerReader(0, reading, parser)
    tokens = [*ids_of(tokenizer, text), *([eos_of(tokenizer)] if end else [])]
    deltas = [reader.push(SampledToken(token, False)) for token in tokens if not reader.finished]
    return reader, deltas


def test_reasoning_is_counted_and_not_cut_by_a_stop_string(tokenizer: Tokenizer) -> None:
    parser = ScriptedParser([Reasoning("END")], [], [Content("aE")], [Content("ND")])

    reader, deltas = read(tokenizer, parser, "rrab", "END")

    assert reader.reasoning_tokens == 2
    assert [delta.pieces for delta in deltas] == [
        (Reasoning("END"),),
        (),
        (Content("a"),),
        (),
    ]
    assert deltas[-1].finish_reason == "stop"


def test_calls_are_a_reason_to_finish_of_their_own(tokenizer: Tokenizer) -> None:
    call = ToolCall(0, "call_1", "f")
    parser = ScriptedParser([Content("E"), call], [ToolArguments(0, "END")])

    _, deltas = read(tokenizer, parser, "ab", "END")

    assert [delta.pieces for delta in deltas] == [
        (Content("E"), call),
        (ToolArguments(0, "END"),),
        (),
    ]
    assert deltas[-1].finish_reason == "tool_calls"


def test_an_answer_is_over_when_its_parser_says_so(tokenizer: Tokenizer) -> None:
    parser = ScriptedParser([ToolCall(0, "call_1", "f")])
    parser.ended = True

    reader, deltas = read(tokenizer, parser, "abc")

    assert reader.finished
    assert [delta.finish_reason for delta in deltas] == ["tool_calls"]


def test_special_tokens_that_the_parser_needs_are_shown_to_it_alone(tokenizer: Tokenizer) -> None:
    eos = eos_of(tokenizer)
    parser = ScriptedParser([Content("a")])

    _, deltas = read(tokenizer, parser, "a", kept=frozenset([eos]))

    assert parser.texts[:2] == ["a", "<|end|>"]
    assert joined(deltas) == ("a", "stop")


# --- spaces --------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["sequence", "unstripped", "metaspace"])
def test_text_that_goes_on_with_a_prompt_keeps_its_first_space(
    tmp_path: Path, decoder: str
) -> None:
    tokenizer = Tokenizer.load(save_sentencepiece(tmp_path, decoder))
    prompt, answer = ids_of(tokenizer, "ab"), ids_of(tokenizer, "ab a b")[2:]
    reading = Reading(tokenizer=tokenizer, end_tokens=frozenset(), context=prompt, scored=True)
    reader = AnswerReader(0, reading, PlainParser())

    deltas = [reader.push(SampledToken(token, False, -1.0)) for token in answer]

    assert "".join(map(text_of, deltas)) == " a b"
    assert b"".join(s.raw for delta in deltas for s in delta.scores) == b" a b"
