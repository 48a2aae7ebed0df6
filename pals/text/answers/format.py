"""How the answers of one model are read, and what its chat template is given."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pals.text.answers.families import HARMONY, PLAIN, Family, family_of
from pals.text.answers.grammar import (
    GrammarWriter,
    after_analysis,
    after_thinking,
    answer_expression,
    answer_or_call,
    calls_expression,
    final_message,
    text_or_calls,
)
from pals.text.answers.pieces import Content, Piece
from pals.text.answers.reasoning import MISTRAL_THINK, THINK, Thinking, reasoning
from pals.text.answers.region import Calls
from pals.text.answers.source import Reader, ReaderParser, Source, until
from pals.text.answers.tools import ToolSpec, ToolUse
from pals.text.answers.turns import Turn, tool_objects, turns_for
from pals.text.files import load_settings
from pals.text.template import load_template
from pals.text.tokenizer import Tokenizer
from pals.types import Grammar

_TOOLS = re.compile(r"\btools\b")


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


class PlainParser:
    """Takes all text for content, as where no conversation is answered."""

    ended = False

    def push(self, text: str) -> list[Piece]:
        return [Content(text)] if text else []

    def finish(self) -> list[Piece]:
        return []


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """The format of one model's answers.

    Attributes:
        family: Who writes like that.
        thinking: The marks around its reasoning, where it has some.
        template_reads_tools: The chat template puts the tools into the prompt.
        special: Special tokens of the tokenizer that are marks of the format, by name.
        tokens: All marks that are one token, by name.
    """

    family: Family = PLAIN
    thinking: Thinking | None = None
    template_reads_tools: bool = False
    special: Mapping[str, int] = field(default_factory=dict[str, int])
    tokens: Mapping[str, int] = field(default_factory=dict[str, int])

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
        tokens = {name: i for name, i in tokenizer.added_tokens().items() if name in marks}
        return cls(
            family=family,
            thinking=thinking,
            # what another template tells of calls is a form that nobody here reads
            template_reads_tools=family is not PLAIN and _speaks_of_tools(template or ""),
            special={name: i for name, i in tokens.items() if i in tokenizer.special_ids},
            tokens=tokens,
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

    def grammar(
        self, use: ToolUse | None, *, prompt_tail: str = "", answer: Grammar | None = None
    ) -> Grammar | None:
        """Return what a whole answer may consist of, its reasoning included; None if it is free.

        Args:
            use: The tools of the request, of which one may have to be called.
            prompt_tail: As in `parser`.
            answer: What the content has to be. Of kind ``json_object`` or ``json_schema``;
                another is the grammar of the whole answer, and returned as it is.
        """
        tools = callable_tools(use)
        must_call = bool(tools) and use is not None and (use.named or use.choice == "required")
        if answer is None and not (must_call or any(tool.strict for tool in tools)):
            return None
        if answer is not None and self._is_whole(answer, tools, prompt_tail):
            return answer
        writer = GrammarWriter(self.tokens)
        if must_call:
            content = self._calls(writer, use, tools)
        elif answer is None:
            content = self._free_content(writer, self._calls(writer, use, tools))
        else:
            content = self._json_content(writer, answer_expression(writer, answer), use, tools)
        return writer.lark(self._after_reasoning(writer, content, prompt_tail))

    def _is_whole(self, answer: Grammar, tools: Sequence[ToolSpec], prompt_tail: str) -> bool:
        """Return whether there is nothing that a grammar for the content leaves out."""
        is_json = answer.kind in ("json_object", "json_schema")
        reasons = self.thinking is not None and not self.thinking.over(prompt_tail)
        return not is_json or not (tools or reasons or self.family is HARMONY)

    def _calls(self, writer: GrammarWriter, use: ToolUse | None, tools: Sequence[ToolSpec]) -> str:
        several = use is None or use.parallel
        return calls_expression(writer, self.family, tools, several=several)

    def _free_content(self, writer: GrammarWriter, calls: str) -> str:
        """Return an expression for any text with calls in it, or instead of it."""
        if self.family is HARMONY:
            return f"{final_message(writer, 'TEXT')} | {calls}"
        return text_or_calls(self.family, calls)

    def _json_content(
        self,
        writer: GrammarWriter,
        answer: str,
        use: ToolUse | None,
        tools: Sequence[ToolSpec],
    ) -> str:
        """Return an expression for an answer in JSON, or calls instead of it."""
        if self.family.syntax.is_bare:
            return answer_or_call(writer, answer, tools)
        content = final_message(writer, answer) if self.family is HARMONY else answer
        return f"{content} | {self._calls(writer, use, tools)}" if tools else content

    def _after_reasoning(self, writer: GrammarWriter, answer: str, prompt_tail: str) -> str:
        if self.family is HARMONY:
            return after_analysis(writer, answer)
        if self.thinking is not None:
            return after_thinking(writer, self.thinking, prompt_tail, answer)
        return answer

    def template_messages(self, messages: Sequence[Turn], use: ToolUse | None) -> list[Turn]:
        """Return messages in OpenAI's form as the model's chat template wants them.

        Raises:
            InvalidRequest: The arguments of an earlier call are no JSON object.
        """
        described = () if self.template_reads_tools else shown_tools(use)
        return turns_for(self.family, messages, described)

    def template_tools(self, use: ToolUse | None) -> list[Turn] | None:
        """Return the tools for `ChatTemplate.render`; None where it shall be given none."""
        tools = shown_tools(use) if self.template_reads_tools else ()
        return tool_objects(tools) or None

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


def shown_tools(use: ToolUse | None) -> Sequence[ToolSpec]:
    """Return the tools that the model is told of."""
    return use.tools if callable_tools(use) and use is not None else ()


def _speaks_of_tools(template: str) -> bool:
    return _TOOLS.search(template) is not None


def _thinking_of(template: str) -> Thinking | None:
    for thinking in (THINK, MISTRAL_THINK):
        if thinking.close in template or thinking.open in template:
            return thinking
    return None
