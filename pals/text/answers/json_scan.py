"""JSON as models write it: whole values, and one followed while it is written (RFC 8259)."""

from __future__ import annotations

import json
import re

MAX_DEPTH = 64
MAX_SCALAR_CHARACTERS = 400

SPACE = " \t\n\r"
SCALAR_END = frozenset(",]}" + SPACE)
SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)
_ESCAPED = frozenset('"\\/bfnrt')
_HEX = frozenset("0123456789abcdefABCDEF")


def parse_json(text: str) -> object:
    """Return the value of a text; control characters may stand in its strings.

    Raises:
        ValueError: It is no JSON, or too deep.
    """
    try:
        return json.loads(text, strict=False, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("too deep") from None


def _refuse(name: str) -> object:
    raise ValueError(name)


def write_json(value: object) -> str:
    """Return the text of a value, with escapes only where it could not be sent without."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isascii() or _is_unicode(text) else json.dumps(value)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class JsonScanner:
    """Checks a value that is no scalar, character by character.

    It remembers how deep it is and not what it read.

    Attributes:
        done: The value is complete.
        failed: What came is no JSON; nothing may be pushed after that.
    """

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self._open: list[str] = []
        self._expect = "value"
        self._scalar = ""
        self._escape = 0
        self._in_string = False
        self._is_key = False

    def push(self, text: str) -> tuple[int, str]:
        """Read until the value is complete or wrong.

        Returns:
            How many characters belong to it, and their text. Control characters in strings,
            which JSON forbids and models write, are escaped in it.
        """
        written: list[str] = []
        for at, character in enumerate(text):
            if self.done or self.failed:
                return at, "".join(written)
            written.append(self._push(character))
            if self.failed:
                return at, "".join(written[:-1])
        return len(text), "".join(written)

    def _push(self, character: str) -> str:
        if self._in_string:
            return self._push_in_string(character)
        if self._scalar or (self._expect in ("value", "item") and self._begins_scalar(character)):
            if character not in SCALAR_END:
                self._scalar += character
                self.failed = len(self._scalar) > MAX_SCALAR_CHARACTERS
                return character
            self.failed = SCALAR.fullmatch(self._scalar) is None
            self._scalar = ""
            self._expect = "next"
        if character not in SPACE and not self.failed:
            self._push_structure(character)
        return character

    def _begins_scalar(self, character: str) -> bool:
        return bool(self._open) and character not in '{["]' + SPACE

    def _push_in_string(self, character: str) -> str:
        if self._escape:
            self._push_escaped(character)
        elif character == "\\":
            self._escape = 1
        elif character == '"':
            self._in_string = False
            self._expect = "colon" if self._is_key else "next"
            self.done = not self._open
        elif character < " ":
            return f"\\u{ord(character):04x}"
        return character

    def _push_escaped(self, character: str) -> None:
        """1 is the character after a backslash, 2 to 5 the digits after a ``u``."""
        if self._escape == 1:
            self.failed = character not in _ESCAPED and character != "u"
            self._escape = 2 if character == "u" else 0
            return
        self.failed = character not in _HEX
        self._escape = 0 if self._escape == 5 else self._escape + 1

    def _push_structure(self, character: str) -> None:
        expect, inside = self._expect, self._open[-1] if self._open else ""
        if character == '"' and expect in ("value", "item", "key", "first key"):
            self._in_string, self._is_key = True, expect.endswith("key")
        elif character in "{[" and expect in ("value", "item"):
            self._open.append(character)
            self.failed = len(self._open) > MAX_DEPTH
            self._expect = "first key" if character == "{" else "item"
        elif (character == "}" and inside == "{" and expect in ("first key", "next")) or (
            character == "]" and inside == "[" and expect in ("item", "next")
        ):
            self._open.pop()
            self._expect = "next"
            self.done = not self._open
        elif character == ":" and expect == "colon":
            self._expect = "value"
        elif character == "," and expect == "next":
            self._expect = "key" if inside == "{" else "value"
        else:
            self.failed = True
