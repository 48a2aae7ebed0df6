"""The tools that a model may call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSpec:
    """A function that the model may call.

    Attributes:
        name: How the model calls it.
        description: What it does, for the model.
        parameters: The JSON schema of its arguments; None where it takes none.
        strict: Hold the model to that schema.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, object] | None = None
    strict: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """Which tools an answer may call, and whether it has to.

    Attributes:
        tools: All of them.
        choice: ``none``, ``auto`` or ``required``; or with ``named`` the name of one.
        named: The answer has to call the tool that ``choice`` names.
        parallel: An answer may call several times.
    """

    tools: tuple[ToolSpec, ...]
    choice: str = "auto"
    named: bool = False
    parallel: bool = True
