"""What a model writes to itself before its answer, between two marks."""

from __future__ import annotations

from dataclasses import dataclass

from pals.text.answers.pieces import Reasoning
from pals.text.answers.source import Reader, Source, skip_space, take_mark, until

PROMPT_TAIL_CHARACTERS = 64


@dataclass(frozen=True, slots=True)
class Thinking:
    """The marks around a model's reasoning."""

    open: str
    close: str

    def begun(self, prompt_tail: str) -> bool:
        """Return whether the prompt has opened the reasoning."""
        return prompt_tail.rstrip().endswith(self.open)

    def over(self, prompt_tail: str) -> bool:
        """Return whether the prompt has closed it: the model is not to reason."""
        return prompt_tail.rstrip().endswith(self.close)


THINK = Thinking("<think>", "</think>")
MISTRAL_THINK = Thinking("[THINK]", "[/THINK]")


def reasoning(source: Source, thinking: Thinking, prompt_tail: str) -> Reader[None]:
    """Read the reasoning, if an answer begins with one.

    White space next to the marks is the format's, and left out.
    """
    if thinking.over(prompt_tail):
        return
    opened = yield from take_mark(source, thinking.open)
    if not opened and not thinking.begun(prompt_tail):
        return
    yield from skip_space(source)
    if (yield from until(source, [thinking.close], Reasoning)) is not None:
        yield from skip_space(source)
