"""How much work something is, by what it runs and holds: the same under any load."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

TraceFunction = Callable[[FrameType, str, Any], Any]


@dataclass
class Work:
    """What ran and what was held so far.

    Attributes:
        lines: Calls, lines and returns of Python in this thread.
        peak_bytes: The most that Python's memory grew by; set when it is over.
    """

    lines: int = 0
    peak_bytes: int = 0

    def trace(self, frame: FrameType, event: str, value: object) -> TraceFunction:
        self.lines += 1
        return self.trace


@contextmanager
def measuring_work() -> Iterator[Work]:
    """Count what the block runs, with its loops' turns, and what it holds."""
    work, before = Work(), sys.gettrace()
    tracemalloc.start()
    sys.settrace(work.trace)
    try:
        yield work
    finally:
        sys.settrace(before)
        _, work.peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
