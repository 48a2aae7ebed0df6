"""Waiting, with a deadline, for something that nobody announces."""

from __future__ import annotations

import threading
from collections.abc import Callable

DEADLINE_S = 40.0
POLL_S = 0.02


def wait_until(condition: Callable[[], object]) -> None:
    pause = threading.Event()
    for _ in range(int(DEADLINE_S / POLL_S)):
        if condition():
            return
        pause.wait(POLL_S)
    raise AssertionError("it did not happen in time")
