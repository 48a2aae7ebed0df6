"""How much each peer, or address, may ask of this machine: one token bucket for each.

Pure: the time is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class RateLimit:
    """Token buckets by peer, or by whatever else tells those who ask apart.

    Attributes:
        per_s: Tokens that a bucket gains in a second.
        burst: Tokens that a bucket holds; it starts full.
    """

    per_s: float
    burst: float
    _buckets: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])

    def allows(self, peer: str, now: float) -> bool:
        """Take a token of ``peer`` at ``now`` (seconds); False when it has none left."""
        tokens, since = self._buckets.get(peer, (self.burst, now))
        tokens = min(self.burst, tokens + (now - since) * self.per_s)
        allowed = tokens >= 1
        self._buckets[peer] = (tokens - 1 if allowed else tokens, now)
        return allowed

    @property
    def size(self) -> int:
        """How many buckets are held."""
        return len(self._buckets)

    def purge(self, now: float) -> None:
        """Forget the buckets that have filled up again."""
        self._buckets = {
            peer: (tokens, since)
            for peer, (tokens, since) in self._buckets.items()
            if tokens + (now - since) * self.per_s < self.burst
        }
