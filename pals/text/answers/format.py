"""How the answers of one model are read, and what its chat template is given."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pals.text.answers.families import HARMONY, PROMPTED, Family, family_of
from pals.text.answers.pieces import Content, Piece
from pals.text.answers.reasoning import MISTRAL_THINK, THINK, Thinking, reasoning
from pals.text.answers.region import Calls
from pals.text.answers.source import Reader, ReaderParser, Source, until
from pals.text.answers.tools import ToolSpec, ToolUse
from pals.text.files import load_settings
from pals.text.template import load_template
from pals.text.tokenizer import Tokenizer

_READS_TOOLS = re.compile(r"\btools\b")


class AnswerParser(Protocol):
    """Reads one answer; the pieces depend on its text, never on how that is cut.

    Attributes:
        ended: The answer is over, whatever the model still writes: it may call only once,
            or has handed over to a tool.
    """

    @property
    def ended(self) -> bool: ...

    def push(self, text: str) -> list[Piece]:
        """Take the next text; return the pieces that no later text can change."""
        ...

    def finish(self) -> list[Piece]:
        """Return what was held back: the answer ends here."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """The format of one model's answers.

    Attributes:
        family: Who writes like that.
        thinking: The marks around its reasoning, where it has some.
        template_reads_tools: The chat template puts the tools into the prompt.
        special: Special tokens of the tokenizer that are marks of the format, by name.
    """

    family: Family = PROMPTED
    thinking: Thinking | None = None
    template_reads_tools: bool = False
    special: Mapping[str, int]

    @classmethod
    def detect(cls, folder: Path, tokenizer: Tokenizer) -> AnswerFormat:
        """Recognise the family by the chat template, the tokens and config.json.

        Raises:
            CorruptModel: A file is too large or does not parse.
        """
        template = load_template(folder)
        family = family_of(template, load_settings(folder / "config.json").get("model_type"))
        thinking = None if family is HARMONY else _thinking_of(template or "")
        marks = {*family.marks, *((thinking.open, thinking.close) if thinking else ())}
        return cls(
            family=family,
            thinking=thinking,
            template_reads_tools=_READS_TOOLS.search(template or "") is not None,
            special={name: i for name, i in tokenizer.special_names().items() if name in marks},
        )

    @property
    def kept_tokens(self) -> frozenset[int]:
        """Special tokens whose names the parser has to see in the text."""
        return frozenset(self.special.values())

    def parser(self, use: ToolUse | None, *, prompt_tail: str) -> AnswerParser:
        """Return a parser for one answer.

        Args:
            use: The tools of the request; None where it has none.
            prompt_tail: End of the rendered prompt, `PROMPT_TAIL_CHARACTERS` at least; a
                template may have opened the reasoning.
        """
        source = Source(tuple(self.special))
        tools = {tool.name: tool.parameters or {} for tool in callable_tools(use)}
        calls = Calls(tools, several=use is None or use.parallel)
        return ReaderParser(source, self._read(source, calls, prompt_tail))

    def _read(self, source: Source, calls: Calls, prompt_tail: str) -> Reader[None]:
        if self.thinking is not None:
            yield from reasoning(source, self.thinking, prompt_tail)
        if calls.tools or self.family is HARMONY:
            yield from self.family.read(source, calls)
        else:
            yield from until(source, (), Content)


def callable_tools(use: ToolUse | None) -> Sequence[ToolSpec]:
    """Return the tools that an answer may call."""
    if use is None or (use.choice == "none" and not use.named):
        return ()
    return [tool for tool in use.tools if not use.named or tool.name == use.choice]


def _thinking_of(template: str) -> Thinking | None:
    for thinking in (THINK, MISTRAL_THINK):
        if thinking.close in template or thinking.open in template:
            return thinking
    return None
