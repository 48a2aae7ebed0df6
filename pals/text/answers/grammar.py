"""Grammars that hold an answer to a family's form of calls, in llguidance's dialect of Lark.

A mark that is one token of the model's is asked for as that token, or spelled out where the
grammar's tokenizer takes it for text. Arguments follow the schemas of their tools.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from pals.errors import InvalidGrammar
from pals.text.answers.families import Family, Tags
from pals.text.answers.harmony import CHANNEL, CONSTRAIN, END, MESSAGE, START
from pals.text.answers.reasoning import Thinking
from pals.text.answers.tools import ToolSpec
from pals.types import MAX_GRAMMAR_BYTES, Grammar

_DEFINITIONS = ("$defs", "definitions")
_TEXT = "TEXT: /(?s:.*)/"
_NO_OBJECT = r"[^{ \n](?s:.*)"
_GAP = r"GAP: /[ \n]{0,4}/"
_SPACED = {"whitespace_pattern": r"[ \t\n\r]{0,40}"}
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarWriter:
    """Writes the rules of one grammar.

    Args:
        tokens: Ids of the marks that are one token, by name.
    """

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = tokens
        self._rules: list[str] = []
        self._chars = 0
        longest_first = sorted(tokens, key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def rule(self, body: str) -> str:
        """Add a rule and return its name.

        Raises:
            InvalidGrammar: All rules are longer than a grammar may be.
        """
        name = f"r{len(self._rules)}"
        self._add(f"{name}: {body}")
        return name

    def _add(self, rule: str) -> None:
        # Counted as they come: each property of a tool may bring every definition along.
        self._chars += len(rule)
        if self._chars > MAX_GRAMMAR_BYTES:
            problem = f"the tools' schemas make a grammar of more than {MAX_GRAMMAR_BYTES} bytes"
            raise InvalidGrammar(problem=problem)
        self._rules.append(rule)

    def lark(self, start: str) -> Grammar:
        """Return the grammar whose answers are ``start``."""
        return Grammar(
            kind="lark", source="\n".join([f"start: {start}", _TEXT, _GAP, *self._rules])
        )

    def literal(self, text: str) -> str:
        """Return an expression for exactly this text."""
        parts: list[str] = []
        at = 0
        for mark in self._marks.finditer(text):
            parts += [_quoted(text[at : mark.start()]), self._mark(mark[0])]
            at = mark.end()
        return " ".join(part for part in [*parts, _quoted(text[at:])] if part)

    def text_until(self, close: str) -> str:
        """Return an expression for any text and the mark that ends it."""
        first = self._marks.match(close)
        if first is not None:
            return f"TEXT {self.literal(close)}"
        name = f"u{len(self._rules)}"
        self._add(f"{name}[suffix={_quoted(close)}]: TEXT")
        return name

    def json(self, schema: Mapping[str, object], *, lenient: bool = False) -> str:
        """Return an expression for JSON that follows a schema.

        Args:
            schema: The JSON schema; it may have options of its own.
            lenient: Leave out of it what the grammar compiler does not know.
        """
        options = {**_COMPACT, "lenient": True} if lenient else _COMPACT
        body = {"x-guidance": options, **schema}
        return self.rule(f"%json {json.dumps(body, ensure_ascii=False)}")

    def _mark(self, name: str) -> str:
        return f"( <[{self._tokens[name]}]> | {_quoted(name)} )"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


# --- calls ---------------------------------------------------------------------------


def calls_expression(
    writer: GrammarWriter, family: Family, tools: Sequence[ToolSpec], *, several: bool
) -> str:
    """Return an expression for one call, or several, in the form of a family."""
    syntax = family.syntax
    call = writer.rule(" | ".join(_call(writer, family, tool) for tool in tools))
    parts = [writer.literal(syntax.before), call]
    if several and syntax.between is not None:
        parts.append(f"( {writer.literal(syntax.between)} {call} )*")
    return " ".join(part for part in [*parts, writer.literal(syntax.after)] if part)


def _call(writer: GrammarWriter, family: Family, tool: ToolSpec) -> str:
    syntax = family.syntax
    schema = {"type": "object", **(tool.parameters or {})}
    if syntax.tags is None:
        arguments = writer.json(schema, lenient=not tool.strict)
    else:
        arguments = _tagged(writer, syntax.tags, schema, lenient=not tool.strict)
    head = writer.literal(syntax.name + tool.name + syntax.arguments)
    return writer.rule(" ".join(p for p in [head, arguments, writer.literal(syntax.end)] if p))


def _tagged(
    writer: GrammarWriter, tags: Tags, schema: Mapping[str, object], *, lenient: bool
) -> str:
    """Return an expression for keys and values in the order of the schema's properties."""
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict):
        return ""
    needed = cast("list[object]", required) if isinstance(required, list) else []
    definitions = {key: schema[key] for key in _DEFINITIONS if key in schema}
    pairs = [
        _pair(writer, tags, key, {**cast("dict[str, object]", value), **definitions}, lenient)
        + ("" if key in needed else "?")
        for key, value in cast("dict[str, object]", properties).items()
        if isinstance(value, dict)
    ]
    return " ".join(pairs)


def _pair(
    writer: GrammarWriter, tags: Tags, key: str, schema: Mapping[str, object], lenient: bool
) -> str:
    head = writer.literal(tags.key + key + tags.value)
    choices = schema.get("enum")
    if schema.get("type") != "string":
        value = f"{writer.json(schema, lenient=lenient)} {writer.literal(tags.end)}"
    elif isinstance(choices, list):
        value = f"( {_any_of(cast('list[object]', choices))} ) {writer.literal(tags.end)}"
    else:
        value = writer.text_until(tags.end)
    return writer.rule(f"{head} {value}")


def _any_of(texts: Iterable[object]) -> str:
    return " | ".join(json.dumps(str(text), ensure_ascii=False) for text in texts)


# --- answers -------------------------------------------------------------------------


def answer_expression(writer: GrammarWriter, grammar: Grammar) -> str:
    """Return an expression for the JSON that ``grammar`` describes."""
    schema = json.loads(grammar.source) if grammar.kind == "json_schema" else {"type": "object"}
    return writer.json({"x-guidance": _SPACED, **schema})


def answer_or_call(writer: GrammarWriter, answer: str, tools: Sequence[ToolSpec]) -> str:
    """Return an expression for JSON that is an answer or a bare call of a tool.

    The library reads both at once only if their options are the same and no literal begins one.
    """
    calls = [_bare_call(writer, tool) for tool in tools]
    return " | ".join([answer, *calls])


def _bare_call(writer: GrammarWriter, tool: ToolSpec) -> str:
    parameters = {"type": "object", **(tool.parameters or {})}
    definitions = {key: parameters.pop(key) for key in _DEFINITIONS if key in parameters}
    call = {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "parameters": parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
        "x-guidance": _SPACED,
    }
    return writer.json({**call, **definitions})


def text_or_calls(family: Family, calls: str) -> str:
    """Return an expression for any text, in which a call that is begun follows its schema."""
    if family.syntax.is_bare:
        return f"/{_NO_OBJECT}/? | {calls}"
    return f"TEXT ( {calls} TEXT )*"


def after_thinking(writer: GrammarWriter, thinking: Thinking, prompt_tail: str, answer: str) -> str:
    """Return an expression for an answer after its reasoning, if there is any left to do."""
    if thinking.over(prompt_tail):
        return answer
    answer = writer.rule(answer)
    rest = f"{writer.text_until(thinking.close)} GAP {answer}"
    if thinking.begun(prompt_tail):
        return rest
    return f"{answer} | GAP {writer.literal(thinking.open)} {rest}"


def after_analysis(writer: GrammarWriter, message: str) -> str:
    """Return an expression for a harmony message, and perhaps one of analysis before it."""
    analysis = f"{writer.literal(f'{CHANNEL}analysis{MESSAGE}')} {writer.text_until(END)}"
    return f"( {analysis} {writer.literal(f'{START}assistant')} )? {writer.rule(message)}"


def final_message(writer: GrammarWriter, answer: str) -> str:
    """Return an expression for harmony's message to the reader."""
    form = writer.literal(f" {CONSTRAIN}json")
    return f"{writer.literal(f'{CHANNEL}final')} ( {form} )? {writer.literal(MESSAGE)} {answer}"
