"""Reads README.md and docs/: the fenced blocks, and the commands in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`([^`\n]+)`")
_PROMPT = re.compile(r"(?:(?P<user>\w+)@\w+)?\$ (?P<command>.*)")


@dataclass(slots=True)
class Step:
    """A command of a page, whose terminal it is, and the output that the page shows.

    In that output ``…`` stands for anything.
    """

    command: str
    user: str
    output: list[str] = field(default_factory=list)


def blocks(text: str, *languages: str) -> list[tuple[str, str]]:
    """Return language and content of the fenced blocks in these languages, in order."""
    found = [(match[1], match[2]) for match in _BLOCK.finditer(text)]
    return [(language, content) for language, content in found if language in languages]


def snippets(text: str) -> list[str]:
    """Return everything set as code: inline spans and the lines of the blocks."""
    lines = [line for match in _BLOCK.finditer(text) for line in match[2].splitlines()]
    return [*_SPAN.findall(_BLOCK.sub("", text)), *lines]


def steps(console: str) -> Iterator[Step]:
    """Yield the commands of a console block; a backslash continues one on the next line."""
    step: Step | None = None
    for line in console.splitlines():
        prompt = _PROMPT.fullmatch(line)
        if step is not None and step.command.endswith("\\"):
            step.command = step.command[:-1] + line.strip()
        elif prompt is not None:
            if step is not None:
                yield step
            step = Step(command=prompt["command"], user=prompt["user"] or "anna")
        else:
            assert step is not None, f"output without a command: {line!r}"
            step.output.append(line)
    if step is not None:
        yield step


def matches(shown: str, line: str) -> bool:
    """Return whether a line is the one shown, with anything in place of each ``…``."""
    return re.fullmatch(".*".join(map(re.escape, shown.split("…"))), line) is not None
