"""Command lines as they were typed, for a process that starts itself again."""

from __future__ import annotations

from collections.abc import Sequence


def without_option(arguments: Sequence[str], option: str) -> list[str]:
    """Return command-line arguments without an option and its value."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if name.replace("_", "-") != option:  # cyclopts takes `--api_key` for `--api-key`
            kept.append(argument)
        elif not equals:
            next(rest, None)
    return kept
