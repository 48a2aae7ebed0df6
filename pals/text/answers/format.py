"""How the answers of one model are written: its family's marks, as data and as a parser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from pals.text.answers.pieces import Content, Piece
from pals.text.answers.tools import ToolUse
from pals.text.tokenizer import Tokenizer
from pals.types import Grammar

Turn = Mapping[str, object]
"""A message in OpenAI's form: ``tool_calls`` with their arguments in JSON text."""


class AnswerParser(Protocol):
    """Reads one answer; the pieces depend on its text, never on how that is cut.

    Attributes:
        ended: The answer is over, whatever the model still writes: it may call only once.
    """

    @property
    def ended(self) -> bool: ...

    def push(self, text: str) -> list[Piece]: ...

    def finish(self) -> list[Piece]: ...


class PlainParser:
    """Takes all text for content."""

    ended = False

    def push(self, text: str) -> list[Piece]:
        return [Content(text)] if text else []

    def finish(self) -> list[Piece]:
        return []


class AnswerFormat:
    """The format of one model's answers.

    Attributes:
        family: Its name, such as ``hermes``; ``plain`` where none was recognised.
        kept_tokens: Special tokens whose names the parser has to see in the text.
    """

    family: str = "plain"
    kept_tokens: frozenset[int] = frozenset()

    @classmethod
    def detect(cls, folder: Path, tokenizer: Tokenizer) -> AnswerFormat:
        """Recognise the family by the chat template, the tokens and config.json.

        Raises:
            CorruptModel: A file is too large or does not parse.
        """
        del folder, tokenizer
        return cls()

    def parser(self, use: ToolUse | None, *, prompt_tail: str) -> AnswerParser:
        """Return a parser for one answer.

        Args:
            use: The tools of the request; None where it has none.
            prompt_tail: End of the rendered prompt (64 characters will do); a template may
                have opened the reasoning.
        """
        del use, prompt_tail
        return PlainParser()

    def grammar(self, use: ToolUse, *, prompt_tail: str = "") -> Grammar | None:
        """Return the grammar that makes an answer call as ``use`` demands; None if it is free.

        Raises:
            UnsupportedParameter: The model has no way to call tools.
        """
        del use, prompt_tail
        return None

    def after_reasoning(self, grammar: Grammar, *, prompt_tail: str) -> Grammar:
        """Return a grammar for the whole answer of which ``grammar`` is the content."""
        del prompt_tail
        return grammar

    def template_messages(self, messages: Sequence[Turn], use: ToolUse | None) -> list[Turn]:
        """Return the messages as the model's chat template wants them.

        Raises:
            InvalidRequest: The arguments of an earlier call are no JSON object.
        """
        del use
        return list(messages)

    def template_tools(self, use: ToolUse | None) -> list[Mapping[str, object]] | None:
        """Return the tools as the chat template wants them, for `ChatTemplate.render`."""
        del use
        return None
