"""Bounds how often one address, or everybody together, may try something."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from pals.errors import TooManyAttempts
from pals.types import SwarmId

WINDOW_S = 60.0
MAX_ADDRESSES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimits:
    """Attempts within a minute.

    Attributes:
        redeems: Redemptions by one address.
        redeems_of_swarm: Redemptions in one swarm by everybody together.
        swarms: Swarms made by one address.
        writes: Records and hints from one address.
        reads: Lists asked for by one address: of forty members behind one, six each.
    """

    redeems: int = 10
    redeems_of_swarm: int = 100
    swarms: int = 10
    writes: int = 120
    reads: int = 240


class BackendLimiter:
    """The limits of one backend, shared by every transport that it answers on.

    Args:
        limits: What is allowed.
        clock: Monotonic seconds.
    """

    def __init__(
        self, limits: RateLimits | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        limits = limits or RateLimits()
        self._clock = clock
        self._redeems = AttemptLimiter(limits.redeems)
        self._redeems_of_swarm = AttemptLimiter(limits.redeems_of_swarm)
        self._swarms = AttemptLimiter(limits.swarms)
        self._writes = AttemptLimiter(limits.writes)
        self._reads = AttemptLimiter(limits.reads)

    def redeem(self, source: str, swarm_id: SwarmId) -> None:
        """Count one redemption by ``source``, an address literal or a peer id.

        Who is over the own limit uses up nothing of the swarm's.

        Raises:
            TooManyAttempts: There were as many within this minute as there may be.
        """
        now = self._clock()
        self._redeems.check(source, now)
        self._redeems_of_swarm.check(swarm_id.hex(), now)

    def create_swarm(self, source: str) -> None:
        """Count one swarm made by ``source``; raises like `redeem`."""
        self._swarms.check(source, self._clock())

    def write(self, source: str) -> None:
        """Count one record or hint from ``source``; raises like `redeem`."""
        self._writes.check(source, self._clock())

    def read(self, source: str) -> None:
        """Count one list asked for by ``source``; raises like `redeem`."""
        self._reads.check(source, self._clock())


class AttemptLimiter:
    """A fixed window of a minute per address; an IPv6 /64 counts as one.

    Args:
        limit: Attempts within a window.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._windows: OrderedDict[str, tuple[float, int]] = OrderedDict()
        self._lock = Lock()

    def check(self, address: str, now: float) -> None:
        """Count one attempt.

        Args:
            address: Address literal of the caller, or any other text as it is.
            now: Monotonic seconds.

        Raises:
            TooManyAttempts: The window's attempts are used up.
        """
        with self._lock:
            self._count(_group(address), now)

    def _count(self, key: str, now: float) -> None:
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
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    # Someone who reaches the backend by both families is one caller.
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))
