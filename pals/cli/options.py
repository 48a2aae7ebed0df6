"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, Token, validators

from pals.types import LayerRange, parse_bytes

AUTO = "auto"
"""Layers that are chosen when the shard starts."""

_COUNT = re.compile(r"(\d+)(k?)", re.IGNORECASE)

ConfigDir = Annotated[
    Path | None,
    Parameter(
        name="--config-dir",
        help="Profile folder; `PALS_CONFIG_DIR` or the user's configuration folder when left out.",
    ),
]
"""The profile a command works on; pass it to `pals.config.config_dir`."""

SwarmName = Annotated[
    str | None,
    Parameter(
        name="--swarm",
        help="Swarm, by its name or the first characters of its id; the profile's only one when "
        "left out.",
    ),
]
"""Which of the profile's swarms a command is about; pass it to `Profile.load_swarm`."""

Json = Annotated[
    bool,
    Parameter(name="--json", negative="", help="Print one JSON document on standard output."),
]
"""Whether to print a document for programs instead of lines for people."""


def parse_tokens(text: str) -> int:
    """Read a number of tokens, such as ``4096`` or ``32k`` (32 x 1024).

    Raises:
        ValueError: It is none.
    """
    match = _COUNT.fullmatch(text)
    if match is None:
        raise ValueError(f"`{text}` is no number of tokens; write one such as 4096 or 32k")
    return int(match[1]) * (1024 if match[2] else 1)


def parse_layers(layers: str | None) -> LayerRange | None:
    """Read ``--layers`` of commands that may serve some too; None where there are none to read.

    Raises:
        ValueError: It is neither a range nor `AUTO`.
    """
    return None if layers in (None, AUTO) else LayerRange.parse(layers)


def read_size(_: type, tokens: Sequence[Token]) -> int:
    """Convert one size on the command line."""
    return parse_bytes(tokens[0].value)


def read_sizes(_: type, tokens: Sequence[Token]) -> tuple[int, ...]:
    """Convert sizes on the command line."""
    return tuple(parse_bytes(token.value) for token in tokens)


def _read_tokens(_: type, tokens: Sequence[Token]) -> int:
    return parse_tokens(tokens[0].value)


Tokens = Annotated[
    int | None,
    Parameter(
        converter=_read_tokens,
        validator=validators.Number(gte=1),
        help="Most tokens of one session, such as `4096` or `32k`.",
    ),
]
"""A number of tokens."""
