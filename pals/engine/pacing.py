"""How long steps take, and how much of that prompts may take while others decode.

Pure: times are arguments, seconds on a monotonic clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pals.engine.buckets import Program

SMOOTHING = 0.125
UNMEASURED_STEP_S = 0.01
UNMEASURED_TOKEN_S = 0.001
ROUNDING_S = 1e-9


class StepCosts:
    """Seconds that a step of each program takes, as smoothed over its last ones.

    Warm-up runs every program once, so that no guess is left when a shard is announced.
    """

    def __init__(self, seconds: Mapping[Program, float] | None = None) -> None:
        self._seconds = dict(seconds or {})

    def note(self, program: Program, seconds: float) -> None:
        """Take how long a step took."""
        before = self._seconds.setdefault(program, seconds)
        self._seconds[program] = before + SMOOTHING * (seconds - before)

    def seconds(self, program: Program) -> float:
        """Return how long a step will take; a guess for a program that never ran."""
        guess = UNMEASURED_STEP_S + UNMEASURED_TOKEN_S * program.tokens
        return self._seconds.get(program, guess)


@dataclass(frozen=True, slots=True)
class ChunkOption:
    """A size that the next chunk may have.

    Attributes:
        tokens: Of the prompt.
        cost_s: What it takes from those who decode, in seconds.
    """

    tokens: int
    cost_s: float


@dataclass(slots=True)
class PrefillPace:
    """A purse of seconds for prompts, which fills with time while something waits.

    It holds at most what a chunk takes that has its share of one step, or the smallest one
    where that is more: a chunk is never so long that others notice more than its share of
    their steps, and the smallest comes when it has been saved for.

    Attributes:
        share: Of the time, for prompts; above 0, below 1.
    """

    share: float
    _purse_s: float = field(default=float("inf"))
    _filled_at: float | None = None

    def fill(self, now: float) -> None:
        """Put in the share of the time since the last call."""
        if self._filled_at is not None:
            self._purse_s += self.share * max(0.0, now - self._filled_at)
        self._filled_at = now

    def rest(self) -> None:
        """Note that no prompt waits: the next one begins at once."""
        self._purse_s = float("inf")

    def choose(self, options: Sequence[ChunkOption], step_s: float) -> ChunkOption | None:
        """Return the longest chunk that can be paid for now, and take that out.

        Args:
            options: At least one.
            step_s: How long a step of those who decode takes without a chunk.
        """
        smallest_s = min(option.cost_s for option in options)
        most_s = max(smallest_s, step_s * self.share / (1 - self.share))
        self._purse_s = min(self._purse_s, most_s)
        paid = [o for o in options if o.cost_s <= self._purse_s + ROUNDING_S]
        if not paid:
            return None
        chosen = max(paid, key=lambda option: (option.tokens, -option.cost_s))
        self._purse_s -= chosen.cost_s
        return chosen

    def refund(self, cost_s: float) -> None:
        """Put back what a chunk would have cost that found no room."""
        self._purse_s += cost_s

    def pays_at(self, cost_s: float) -> float:
        """Return when the purse will hold ``cost_s``, on the clock of `fill`."""
        assert self._filled_at is not None
        return self._filled_at + max(0.0, cost_s - self._purse_s) / self.share
