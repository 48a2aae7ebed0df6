"""Calls as JSON: ``{"name": …, "arguments": {…}}``, with marks around them or none.

The formats are those of the models' own chat templates: Hermes 2 Pro, Qwen 2.5 and 3; Llama 3.1
to 3.3, whose key is ``parameters``; Mistral 7B v0.3 to Devstral; DeepSeek V3, R1 and V3.1;
Kimi K2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pals.text.answers.json_scan import SPACE
from pals.text.answers.pieces import Content
from pals.text.answers.region import Calls, MalformedCall, Region, read_call, whole_call
from pals.text.answers.source import Reader, Source, skip_space, until

MAX_NAME_CHARACTERS = 256

HERMES_OPEN, HERMES_CLOSE = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
MISTRAL_CALLS, MISTRAL_ID, MISTRAL_ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"

_BAR = "\uff5c"
DEEPSEEK_CALLS, DEEPSEEK_CALLS_END = (f"<{_BAR}tool▁calls▁{w}{_BAR}>" for w in ("begin", "end"))
DEEPSEEK_CALL, DEEPSEEK_CALL_END = (f"<{_BAR}tool▁call▁{w}{_BAR}>" for w in ("begin", "end"))
DEEPSEEK_SEPARATOR = f"<{_BAR}tool▁sep{_BAR}>"
DEEPSEEK_MARKS = (
    DEEPSEEK_CALLS,
    DEEPSEEK_CALLS_END,
    DEEPSEEK_CALL,
    DEEPSEEK_CALL_END,
    DEEPSEEK_SEPARATOR,
)
KIMI_CALLS, KIMI_CALLS_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
KIMI_CALL, KIMI_CALL_END = "<|tool_call_begin|>", "<|tool_call_end|>"
KIMI_SEPARATOR = "<|tool_call_argument_begin|>"
KIMI_MARKS = (KIMI_CALLS, KIMI_CALLS_END, KIMI_CALL, KIMI_CALL_END, KIMI_SEPARATOR)

_KIMI_NAME = re.compile(r"functions\.(.+):\d+", re.ASCII)
_ARGUMENT_KEYS = ("arguments", "parameters")
_KEYS = (*_ARGUMENT_KEYS, "name", "type", "id")
_NOTHING_AFTER_A_CALL = SPACE + "}"


def hermes(source: Source, calls: Calls) -> Reader[None]:
    """Read text with calls between ``<tool_call>`` and ``</tool_call>``."""
    while (yield from until(source, [HERMES_OPEN], Content)) is not None:
        region = Region(source, [HERMES_CLOSE])
        body = _object(region, calls)
        yield from read_call(region, calls, body, drop=_NOTHING_AFTER_A_CALL)
        if calls.over:
            return
        yield from skip_space(source)


def llama(source: Source, calls: Calls) -> Reader[None]:
    """Read an answer that is a call, or several with ``;`` between them, or else text.

    A ``<|python_tag|>`` may stand before each of them, and Markdown's fence around them.
    """
    mark: str | None = PYTHON_TAG
    while mark is not None and not calls.over:
        region = Region(source, [PYTHON_TAG])
        mark = yield from read_call(region, calls, _objects(region, calls), drop=SPACE + ";,`")


def mistral(source: Source, calls: Calls) -> Reader[None]:
    """Read text, then calls: ``[TOOL_CALLS]`` and an array, or a name, ``[ARGS]`` and an object."""
    mark = yield from until(source, [MISTRAL_CALLS], Content)
    while mark is not None and not calls.over:
        region = Region(source, [MISTRAL_CALLS])
        mark = yield from read_call(region, calls, _array(region, calls), drop=SPACE + "]}")


def deepseek(source: Source, calls: Calls) -> Reader[None]:
    """Read text with calls, each with its name before the separator (V3.1) or after it (V3, R1)."""
    yield from _with_separators(source, calls, DEEPSEEK_MARKS, DEEPSEEK_CALL, DEEPSEEK_SEPARATOR)


def kimi(source: Source, calls: Calls) -> Reader[None]:
    """Read text with calls, each with a name such as ``functions.NAME:0``."""
    yield from _with_separators(source, calls, KIMI_MARKS, KIMI_CALL, KIMI_SEPARATOR)


def _with_separators(
    source: Source, calls: Calls, marks: Sequence[str], begin: str, separator: str
) -> Reader[None]:
    mark = yield from until(source, marks, Content)
    while mark is not None and not calls.over:
        if mark != begin:
            yield from skip_space(source)
            mark = yield from until(source, marks, Content)
            continue
        region = Region(source, marks)
        body = _separated(region, calls, separator)
        mark = yield from read_call(region, calls, body, drop=SPACE + "`")


def _object(region: Region, calls: Calls) -> Reader[None]:
    """Read one call; its arguments are streamed if its name comes before them."""
    yield from region.expect("{")
    name: object = None
    arguments: object = None
    is_open, separator = False, ","
    while separator == ",":
        key = yield from region.value()
        if key not in _KEYS:
            raise MalformedCall
        yield from region.expect(":")
        first = yield from region.next()
        if key in _ARGUMENT_KEYS and isinstance(name, str) and first == "{" and not is_open:
            yield from region.stream_arguments(calls.open(name))
            is_open = True
        elif key in _ARGUMENT_KEYS:
            arguments = yield from region.value()
        else:
            value = yield from region.value()
            name = value if key == "name" else name
        separator = yield from region.expect(",}")
    if not is_open:
        yield from whole_call(calls, name, arguments)


def _objects(region: Region, calls: Calls) -> Reader[None]:
    """Read calls with nothing around them, up to text that begins none."""
    yield from _fence(region)
    found = "{"
    while found == "{":
        yield from _object(region, calls)
        if calls.over:
            return
        while (found := (yield from region.next())) and found in ";,":
            region.advance(1)
        region.held = ""


def _array(region: Region, calls: Calls) -> Reader[None]:
    """Read calls in an array, or a single one in either form."""
    first = yield from region.next()
    if first != "[":
        yield from _object(region, calls) if first == "{" else _named(region, calls)
        return
    separator = region.advance(1)
    while separator != "]":
        yield from _object(region, calls)
        if calls.over:
            return
        separator = yield from region.expect(",]")


def _named(region: Region, calls: Calls) -> Reader[None]:
    """Read ``name[CALL_ID]id[ARGS]{…}``, of which the id may be missing."""
    name, mark = yield from region.before([MISTRAL_ID, MISTRAL_ARGUMENTS])
    if mark == MISTRAL_ID:
        _, mark = yield from region.before([MISTRAL_ARGUMENTS])
    if mark != MISTRAL_ARGUMENTS:
        raise MalformedCall
    yield from _arguments_of(name, region, calls)


def _separated(region: Region, calls: Calls, separator: str) -> Reader[None]:
    name, mark = yield from region.before([separator])
    if mark != separator:
        raise MalformedCall
    if (yield from region.next()) != "{":
        name = yield from region.word("\n", MAX_NAME_CHARACTERS)
        yield from _fence(region)
    yield from _arguments_of(name, region, calls)


def _arguments_of(name: str, region: Region, calls: Calls) -> Reader[None]:
    if (yield from region.next()) != "{":
        raise MalformedCall
    name = name.strip()
    numbered = _KIMI_NAME.fullmatch(name)
    yield from region.stream_arguments(calls.open(numbered[1] if numbered else name))


def _fence(region: Region) -> Reader[None]:
    """Take the first line of Markdown's code, such as three backticks and ``json``."""
    if (yield from region.next()) == "`":
        line = yield from region.word("\n", MAX_NAME_CHARACTERS)
        if line.strip() not in ("```", "```json", "```tool_call", "```tool_code"):
            raise MalformedCall
