"""Answers read whole, in pieces of one character, and in any cuts, for the tests of families."""

import itertools
from collections.abc import Sequence

from hypothesis import strategies as st

from pals.text.answers.families import Family
from pals.text.answers.format import AnswerFormat
from pals.text.answers.pieces import Content, Piece, Reasoning, ToolArguments, ToolCall
from pals.text.answers.reasoning import Thinking
from pals.text.answers.tools import ToolSpec, ToolUse

WEATHER = ToolSpec(
    name="get_weather",
    description="Weather of a city.",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
        "additionalProperties": False,
    },
)
NOW = ToolSpec(name="now")
TOOLS = ToolUse(tools=(WEATHER, NOW))


def format_of(
    family: Family, thinking: Thinking | None = None, special: Sequence[str] = ()
) -> AnswerFormat:
    return AnswerFormat(
        family=family, thinking=thinking, special={name: i for i, name in enumerate(special)}
    )


def read(
    answers: AnswerFormat,
    parts: Sequence[str],
    use: ToolUse | None = TOOLS,
    prompt_tail: str = "",
) -> list[Piece]:
    """Return the pieces that a parser gives for a text in parts."""
    parser = answers.parser(use, prompt_tail=prompt_tail)
    pieces = [piece for part in parts for piece in parser.push(part)]
    return [*pieces, *parser.finish()]


def joined(pieces: Sequence[Piece]) -> list[tuple[str, ...]]:
    """Return pieces as plain values, those that follow upon their like joined; ids left out."""
    out: list[tuple[str, ...]] = []
    for piece in pieces:
        match piece:
            case ToolCall():
                out.append(("call", str(piece.index), piece.name))
                continue
            case ToolArguments():
                kind = f"arguments {piece.index}"
            case Reasoning():
                kind = "reasoning"
            case Content():
                kind = "content"
        if out and out[-1][0] == kind:
            out[-1] = (kind, out[-1][1] + piece.text)
        else:
            out.append((kind, piece.text))
    return out


def cuts_of(text: str) -> st.SearchStrategy[list[str]]:
    """Return all ways to cut a text."""

    def cut(places: set[int]) -> list[str]:
        bounds = [0, *sorted(places), len(text)]
        return [text[a:b] for a, b in itertools.pairwise(bounds)]

    return st.sets(st.integers(0, len(text)), max_size=8).map(cut)
