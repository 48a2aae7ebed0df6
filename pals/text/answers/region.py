"""The part of a text in which one call is written, and how a call is opened there."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from pals.text.answers.json_scan import (
    SCALAR,
    SCALAR_END,
    SPACE,
    JsonScanner,
    parse_json,
    write_json,
)
from pals.text.answers.pieces import Content, ToolArguments, ToolCall
from pals.text.answers.source import Reader, Source, until

MAX_CALLS = 128
MAX_HELD_CHARACTERS = 1 << 16
"""Of a call before it is certain to be one: it is content if that takes longer."""

_ID_ALPHABET = string.ascii_letters + string.digits
_ID_CHARACTERS = 24


class MalformedCall(Exception):
    """What is written is no call of a tool that was offered."""


def new_call_id() -> str:
    """Return a fresh id, as OpenAI's look: ``call_`` and 24 letters or digits."""
    return "call_" + "".join(secrets.choice(_ID_ALPHABET) for _ in range(_ID_CHARACTERS))


class Calls:
    """The calls of one answer.

    Args:
        tools: Schema of the arguments of each tool that may be called.
        several: An answer may call more than once.
        new_id: Makes the ids.
    """

    def __init__(
        self,
        tools: Mapping[str, Mapping[str, object]],
        *,
        several: bool = True,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self.tools = tools
        self._limit = MAX_CALLS if several else 1
        self._new_id = new_id
        self._count = 0

    @property
    def over(self) -> bool:
        """No more calls may come."""
        return self._count >= self._limit

    def open(self, name: str) -> ToolCall:
        """Begin a call.

        Raises:
            MalformedCall: There is no such tool.
        """
        if name not in self.tools or self.over:
            raise MalformedCall
        call = ToolCall(self._count, self._new_id(), name)
        self._count += 1
        return call


class Region:
    """The text up to the next of some marks, read with a memory of what is not used yet.

    Attributes:
        held: What was read since the last piece that was made of it.
    """

    def __init__(self, source: Source, marks: Sequence[str]) -> None:
        self._source = source
        self._marks = marks
        self.held = ""

    def chunk(self, inner: Sequence[str] = ()) -> Reader[str]:
        """Return the text that lies ready, at least a character; empty at the region's end.

        Args:
            inner: Marks that end it as well.
        """
        while True:
            size, mark = self._look(inner)
            if size or mark is not None or self._source.ended:
                return self._source.text[:size]
            yield None

    def _look(self, inner: Sequence[str] = ()) -> tuple[int, str | None]:
        return self._source.look([*inner, *self._marks, *self._source.strays])

    def advance(self, size: int) -> str:
        """Take text that `chunk` has shown.

        Raises:
            MalformedCall: Too much of it was not used.
        """
        text = self._source.take(size)
        self.held += text
        if len(self.held) > MAX_HELD_CHARACTERS:
            raise MalformedCall
        return text

    def before(self, inner: Sequence[str]) -> Reader[tuple[str, str | None]]:
        """Take the text before the next mark, and that mark if it is one of ``inner``.

        Returns:
            The text, and the mark; None at the end of all text.

        Raises:
            MalformedCall: It is too long.
        """
        text = ""
        while True:
            size, mark = self._look(inner)
            text += self.advance(size)
            if mark is not None and mark in inner:
                self._source.take(len(mark))
            if mark is not None or self._source.ended:
                return text, mark
            yield None

    def next(self) -> Reader[str]:
        """Return the next character that is no white space, without taking it; empty if none."""
        while True:
            text = yield from self.chunk()
            space = len(text) - len(text.lstrip(SPACE))
            if space < len(text) or not text:
                self.advance(space)
                return text[space : space + 1]
            self.advance(space)

    def expect(self, characters: str) -> Reader[str]:
        """Take the next character that is no white space.

        Raises:
            MalformedCall: It is none of ``characters``.
        """
        found = yield from self.next()
        if not found or found not in characters:
            raise MalformedCall
        return self.advance(1)

    def word(self, stops: str, longest: int) -> Reader[str]:
        """Take the text before a character of ``stops``, or before the region's end.

        Raises:
            MalformedCall: It is longer than ``longest``.
        """
        word = ""
        while True:
            text = yield from self.chunk()
            size = next((at for at, c in enumerate(text) if c in stops), len(text))
            word += self.advance(size)
            if len(word) > longest:
                raise MalformedCall
            if size < len(text) or not text:
                return word

    def value(self) -> Reader[object]:
        """Take one JSON value and return it.

        Raises:
            MalformedCall: It is none, or too long.
        """
        first = yield from self.next()
        if not first:
            raise MalformedCall
        if first not in '{["':
            scalar = yield from self.word("".join(SCALAR_END), MAX_HELD_CHARACTERS)
            if SCALAR.fullmatch(scalar) is None:
                raise MalformedCall
            return _decode(scalar)
        scanner, written = JsonScanner(), ""
        while not scanner.done:
            text = yield from self.chunk()
            size, more = scanner.push(text)
            self.advance(size)
            written += more
            if scanner.failed or not text:
                raise MalformedCall
        return _decode(written)

    def stream_arguments(self, call: ToolCall) -> Reader[None]:
        """Yield a call and the object that follows as its arguments, while they are written.

        Raises:
            MalformedCall: It is none; what came of it is out by then.
        """
        if (yield from self.next()) != "{":
            raise MalformedCall
        self.held = ""
        yield call
        scanner = JsonScanner()
        while not scanner.done:
            text = yield from self.chunk()
            size, written = scanner.push(text)
            if written:
                yield ToolArguments(call.index, written)
            self._source.take(size)
            if scanner.failed or not text:
                raise MalformedCall

    def close(self, *, drop: str = "") -> Reader[str | None]:
        """Yield what was not used and what is left of the region as content.

        Args:
            drop: Characters that are left out where they come next.

        Returns:
            The mark at its end, which is taken; None at the end of the text.
        """
        while drop:
            text = yield from self.chunk()
            size = len(text) - len(text.lstrip(drop))
            self._source.take(size)
            if size < len(text) or not text:
                break
        held, self.held = self.held, ""
        return (yield from until(self._source, self._marks, Content, gap=held))


def read_call(
    region: Region, calls: Calls, body: Reader[None], *, drop: str = SPACE
) -> Reader[str | None]:
    """Read what should be one call; what is none is yielded as content.

    Args:
        region: Where it is written.
        calls: The calls of the answer.
        body: Reads it there.
        drop: Characters that mean nothing when they follow a call.

    Returns:
        The mark at the region's end, which is taken; None at the end of the text, and after
        the last call that the answer may make.
    """
    try:
        yield from body
    except MalformedCall:
        return (yield from region.close())
    region.held = ""
    return None if calls.over else (yield from region.close(drop=drop))


def _decode(text: str) -> object:
    try:
        return parse_json(text)
    except ValueError:
        raise MalformedCall from None


def text_of_arguments(value: object) -> str:
    """Return a call's arguments as JSON text, from a whole value that a model wrote.

    Some models write the object once more in a string, or null for none.

    Raises:
        MalformedCall: It is no object either way.
    """
    if isinstance(value, str):
        value = _decode(value)
    if value is None:
        return "{}"
    if not isinstance(value, dict):
        raise MalformedCall
    return write_json(cast("dict[str, object]", value))


def whole_call(calls: Calls, name: object, arguments: object) -> Reader[None]:
    """Yield a call whose arguments are there as a whole.

    Raises:
        MalformedCall: It is none.
    """
    text = text_of_arguments(arguments)
    if not isinstance(name, str):
        raise MalformedCall
    call = calls.open(name)
    yield call
    yield ToolArguments(call.index, text)
