"""Waiting, with a deadline, for something that nobody announces."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

DEADLINE_S = 40.0
POLL_S = 0.02

Found = TypeVar("Found")


def wait_until(condition: Callable[[], Found], *, deadline_s: float = DEADLINE_S) -> Found:
    """Return what ``condition`` returns once that is true."""
    pause = threading.Event()
    deadline = time.monotonic() + deadline_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        pause.wait(POLL_S)
    return found
