"""How one thread sleeps until others have something for it."""

from __future__ import annotations

import threading


class Wake:
    """Wakes one thread, at a lower price than `threading.Condition`, for which steps would pay.

    `prepare` and `ring` are called under one and the same lock of the caller, `sleep` is not.
    """

    def __init__(self) -> None:
        # Held but from a ring until the sleep that it ends.
        self._bell = threading.Lock()
        self._bell.acquire()
        self._is_awaited = False

    def prepare(self) -> None:
        """Let every `ring` from now on end the `sleep` to come."""
        self._bell.acquire(blocking=False)  # the last one may have come after its sleep was over
        self._is_awaited = True

    def sleep(self, timeout_s: float) -> None:
        """Sleep until somebody has rung since `prepare`, or for ``timeout_s`` seconds."""
        self._bell.acquire(timeout=min(timeout_s, threading.TIMEOUT_MAX))

    def ring(self) -> None:
        """Wake the thread if it sleeps, or is about to."""
        if self._is_awaited:
            self._is_awaited = False
            self._bell.release()
