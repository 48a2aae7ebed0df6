"""Calls as tags: GLM 4.5's pairs of key and value, and Qwen3-Coder's functions and parameters.

The values of such calls are plain text where the tool's schema wants a string, and JSON where
it wants something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import cast

from pals.text.answers.json_calls import HERMES_CLOSE, HERMES_OPEN
from pals.text.answers.json_scan import parse_json, write_json
from pals.text.answers.pieces import Content, ToolArguments, ToolCall
from pals.text.answers.region import Calls, MalformedCall, Region, read_call
from pals.text.answers.source import Reader, Source, skip_space, until

GLM_KEY, GLM_KEY_END = "<arg_key>", "</arg_key>"
GLM_VALUE, GLM_VALUE_END = "<arg_value>", "</arg_value>"
GLM_MARKS = (GLM_KEY, GLM_KEY_END, GLM_VALUE, GLM_VALUE_END)
QWEN_FUNCTION, QWEN_FUNCTION_END = "<function=", "</function>"
QWEN_PARAMETER, QWEN_PARAMETER_END = "<parameter=", "</parameter>"
QWEN_MARKS = (QWEN_FUNCTION, QWEN_FUNCTION_END, QWEN_PARAMETER, QWEN_PARAMETER_END)

_ReadCall = Callable[[Region, Calls], Reader[None]]

_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}
_PYTHON_WORDS = {"True": True, "False": False, "None": None}


def glm(source: Source, calls: Calls) -> Reader[None]:
    """Read text with calls of GLM 4.5 and later."""
    yield from _between_tags(source, calls, _glm_call)


def qwen_coder(source: Source, calls: Calls) -> Reader[None]:
    """Read text with calls of Qwen3-Coder and later."""
    yield from _between_tags(source, calls, _qwen_call)


def _between_tags(source: Source, calls: Calls, read: _ReadCall) -> Reader[None]:
    while (yield from until(source, [HERMES_OPEN], Content)) is not None:
        region = Region(source, [HERMES_CLOSE])
        yield from read_call(region, calls, read(region, calls))
        if calls.over:
            return
        yield from skip_space(source)


def _glm_call(region: Region, calls: Calls) -> Reader[None]:
    name, mark = yield from region.before(GLM_MARKS)
    _check(mark is not None)
    call = calls.open(name.strip())
    writer = _ArgumentWriter(call, calls.tools[call.name])
    region.held = ""
    yield call
    while mark == GLM_KEY:
        key, mark = yield from region.before(GLM_MARKS)
        _check(mark == GLM_KEY_END)
        _, mark = yield from region.before(GLM_MARKS)
        _check(mark == GLM_VALUE)
        yield from writer.value(region, key.strip(), GLM_VALUE_END)
        _, mark = yield from region.before(GLM_MARKS)
    _check(mark is not None and mark not in GLM_MARKS)
    yield writer.end()


def _qwen_call(region: Region, calls: Calls) -> Reader[None]:
    _, mark = yield from region.before(QWEN_MARKS)
    _check(mark == QWEN_FUNCTION)
    call = calls.open((yield from _tag_name(region)))
    writer = _ArgumentWriter(call, calls.tools[call.name], lines=True)
    region.held = ""
    yield call
    _, mark = yield from region.before(QWEN_MARKS)
    while mark == QWEN_PARAMETER:
        key = yield from _tag_name(region)
        yield from writer.value(region, key, QWEN_PARAMETER_END)
        _, mark = yield from region.before(QWEN_MARKS)
    _check(mark == QWEN_FUNCTION_END)
    yield writer.end()


def _tag_name(region: Region) -> Reader[str]:
    """Take the rest of an opening tag, such as ``name>``."""
    name, mark = yield from region.before([">"])
    _check(mark == ">")
    return name.strip()


def _check(is_right: bool) -> None:
    if not is_right:
        raise MalformedCall


class _ArgumentWriter:
    """Writes the arguments of one call as a JSON object, value by value.

    Args:
        call: The call.
        schema: Of its arguments.
        lines: A value stands on lines of its own.
    """

    def __init__(
        self, call: ToolCall, schema: Mapping[str, object], *, lines: bool = False
    ) -> None:
        self._index = call.index
        properties = schema.get("properties")
        self._properties = cast(
            "dict[str, object]", properties if isinstance(properties, dict) else {}
        )
        self._lines = lines
        self._count = 0

    def end(self) -> ToolArguments:
        return self._write("}" if self._count else "{}")

    def value(self, region: Region, key: str, close: str) -> Reader[None]:
        """Yield a key and its value, which ends at the mark ``close``; it is taken.

        Raises:
            MalformedCall: There is no such mark, or a value that is no string is too long.
        """
        types = frozenset(_types_of(self._properties.get(key)))
        region.held = ""
        yield self._write((", " if self._count else "{") + write_json(key) + ": ")
        self._count += 1
        if types == frozenset({"string"}):
            yield from self._string(region, close)
            return
        text, mark = yield from region.before([close])
        _check(mark == close)
        region.held = ""
        if self._lines:
            text = text.removeprefix("\n").removesuffix("\n")
        yield self._write(write_json(_typed(text, types)))

    def _string(self, region: Region, close: str) -> Reader[None]:
        """Yield a text while it is written; the line feeds next to its tags are the tags'."""
        yield self._write('"')
        is_first, text = self._lines, ""
        while chunk := (yield from region.chunk([close])):
            text += region.advance(len(chunk))
            region.held = ""
            text, is_first = text.removeprefix("\n") if is_first else text, False
            size = len(text) - (self._lines and text.endswith("\n"))
            if size:
                yield self._write(write_json(text[:size])[1:-1])
            text = text[size:]
        _, mark = yield from region.before([close])
        _check(mark == close)
        yield self._write('"')

    def _write(self, text: str) -> ToolArguments:
        return ToolArguments(self._index, text)


def _typed(text: str, types: frozenset[str]) -> object:
    """Return the value that a text stands for, where it may be of ``types``; all if empty."""
    word = text.strip()
    try:
        value: object = _PYTHON_WORDS[word] if word in _PYTHON_WORDS else parse_json(word)
    except ValueError:
        return text
    fits = not types or any(_is_of_type(value, name) for name in types)
    return value if fits or "string" not in types else text


def _is_of_type(value: object, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, _TYPES.get(name, ()))


def _types_of(schema: object) -> Iterator[str]:
    """Yield the types that a property's schema names, also in alternatives."""
    if not isinstance(schema, dict):
        return
    parts = cast("dict[str, object]", schema)
    named = parts.get("type")
    for name in cast("list[object]", named) if isinstance(named, list) else [named]:
        if isinstance(name, str):
            yield name
    for key in ("anyOf", "oneOf"):
        options = parts.get(key)
        for option in cast("list[object]", options) if isinstance(options, list) else []:
            yield from _types_of(option)
