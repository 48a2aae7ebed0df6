"""How much work something is, by what it runs: the same on each machine and under any load."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

TraceFunction = Callable[[FrameType, str, Any], Any]


@dataclass
class Lines:
    """Calls, lines and returns of Python in this thread so far; what a library runs is none."""

    run: int = 0

    def trace(self, frame: FrameType, event: str, value: object) -> TraceFunction:
        self.run += 1
        return self.trace


@contextmanager
def counting_lines() -> Iterator[Lines]:
    """Count what the block runs, with its loops' turns."""
    lines, before = Lines(), sys.gettrace()
    sys.settrace(lines.trace)
    try:
        yield lines
    finally:
        sys.settrace(before)
