"""How much each peer may ask of this machine: one token bucket a peer.

Pure: the time is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pals.types import PeerId


@dataclass(slots=True, kw_only=True)
class RateLimit:
    """Token buckets by peer.

    Attributes:
        per_s: Tokens that a bucket gains in a second.
        burst: Tokens that a bucket holds; it starts full.
    """

    per_s: float
    burst: float
    _buckets: dict[PeerId, tuple[float, float]] = field(
        default_factory=dict[PeerId, tuple[float, float]]
    )

    def allows(self, peer: PeerId, now: float) -> bool:
        """Take a token of ``peer`` at ``now`` (seconds); False when it has none left."""
        tokens, since = self._buckets.get(peer, (self.burst, now))
        tokens = min(self.burst, tokens + (now - since) * self.per_s)
        allowed = tokens >= 1
        self._buckets[peer] = (tokens - 1 if allowed else tokens, now)
        return allowed

    def purge(self, now: float) -> None:
        """Forget the buckets that have filled up again."""
        self._buckets = {
            peer: (tokens, since)
            for peer, (tokens, since) in self._buckets.items()
            if tokens + (now - since) * self.per_s < self.burst
        }
