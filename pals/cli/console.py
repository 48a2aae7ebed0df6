"""The only module that prints: stdout carries data, stderr everything else.

Text from elsewhere (peers, files, the backend) may hold terminal escapes, so every
function here replaces control characters before it writes.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.text import Text

from pals.errors import PalsError

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_SECRET = re.compile(r"(pp_inv_|sk-pals-)[\w.-]+")
_LITERAL = re.compile(r"`[^`]*`")


class OutputClosed(Exception):
    """Whoever read standard output went away, as `head` does."""


def out(text: str, *, end: str = "\n") -> None:
    """Write a line of data to stdout at once.

    Raises:
        OutputClosed: Nobody reads stdout any more.
    """
    try:
        sys.stdout.write(_printable(text) + end)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
        raise OutputClosed from None


def json(document: object) -> None:
    """Write one JSON document to stdout, on one line.

    Raises:
        OutputClosed: Nobody reads stdout any more.
    """
    out(msgspec.json.encode(document).decode())


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write rows under upper-case headers to stdout, left-aligned, without borders.

    Raises:
        OutputClosed: Nobody reads stdout any more.
    """
    cells = [[h.upper() for h in headers], *[[str(c) for c in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    for row in cells:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        out("  ".join(padded).rstrip())


def clear() -> None:
    """Empty the terminal on stdout before it shows something anew; nothing without one."""
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[H\x1b[2J")


def note(text: str) -> None:
    """Write a line for people to stderr."""
    _to_stderr(_with_literals(text))


def aside(text: str) -> None:
    """Write a piece of a line to stderr, paler than what is data."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        Text(_printable(text), style="dim"), end=""
    )


def warn(text: str) -> None:
    """Write a warning to stderr; only when the user can act on it."""
    _to_stderr(Text("warning: ", style="yellow") + _with_literals(text))


def error(problem: PalsError | str, *, hint: str = "") -> None:
    """Write an error, and what to do about it, to stderr."""
    advice = problem.hint if isinstance(problem, PalsError) else hint
    _to_stderr(Text("error: ", style="red") + _with_literals(str(problem)))
    if advice:
        _to_stderr(Text("\nhint: ", style="cyan") + _with_literals(advice))


def _to_stderr(text: Text) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(text)


def _with_literals(text: str) -> Text:
    styled = Text(_without_secrets(_printable(text)))
    styled.highlight_regex(_LITERAL, "cyan")
    return styled


def _printable(text: str) -> str:
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def _without_secrets(text: str) -> str:
    """Mask invites and keys: a mistyped command line is echoed, and terminals keep their output."""
    return _SECRET.sub(r"\1…", text)


def _discard_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush stays silent."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
