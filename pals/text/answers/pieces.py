"""What an answer consists of once its text is read, in order."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model wrote to itself first."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """The beginning of a call; its arguments follow.

    Attributes:
        index: Its place among the calls of the answer.
        id: What the result will refer to.
        name: Of the tool.
    """

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolArguments:
    """A piece of the arguments, in JSON, of the call with this ``index``."""

    index: int
    text: str


Piece = Content | Reasoning | ToolCall | ToolArguments
