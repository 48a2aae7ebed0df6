"""Bounds how often one address may try something."""

from __future__ import annotations

import ipaddress
from collections import OrderedDict

from pals.errors import TooManyAttempts

WINDOW_S = 60.0
MAX_ADDRESSES = 10_000


class AttemptLimiter:
    """A fixed window of a minute per address; an IPv6 /64 counts as one.

    Args:
        limit: Attempts within a window.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._windows: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def check(self, address: str, now: float) -> None:
        """Count one attempt.

        Args:
            address: Address literal of the caller, or any other text as it is.
            now: Monotonic seconds.

        Raises:
            TooManyAttempts: The window's attempts are used up.
        """
        key = _group(address)
        started, count = self._windows.get(key, (now, 0))
        if now - started >= WINDOW_S:
            started, count = now, 0
        if count >= self._limit:
            raise TooManyAttempts(limit=self._limit)
        self._windows[key] = (started, count + 1)
        self._windows.move_to_end(key)
        if len(self._windows) > MAX_ADDRESSES:
            self._windows.popitem(last=False)


def _group(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if parsed.version == 4:
        return address
    return str(ipaddress.ip_network((parsed, 64), strict=False))
