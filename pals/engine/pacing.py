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
    """A purse of seconds for prompts, which those who decode fill while prompts wait.

    Each step of theirs puts in the share of it that prompts may have. So does the time in which
    no step runs, at half that rate unless chunks end in it before rows come: their rows are at
    other shards, which may be on the same processor, but a prompt must not wait for rows that
    come seldom. Both count once for each short prompt that waits: with a fixed share, sessions
    that end would be more than those that can begin, few would decode and many would wait.

    Whoever decodes waits for all of a chunk beside its row, but only for the rest of one that
    began in the gap before its row came. So chunks wait for gaps: beside rows there is one
    only when the purse is full, which is when no gap has come. It is full with what a chunk
    takes that is long enough for the weights it reads, or one that has its share of a step
    where that is more.

    Attributes:
        share: Of the time, for prompts; above 0, below 1.
    """

    share: float
    _prompts: float = 1
    _purse_s: float = field(default=float("inf"))
    _filled_at: float | None = None
    _ran_s: float = 0.0
    _is_unnoticed: bool = False

    @property
    def _odds(self) -> float:
        """Seconds that prompts may have for one of those who decode."""
        return self._prompts * self.share / (1 - self.share)

    @property
    def _gap_rate(self) -> float:
        part = 1.0 if self._is_unnoticed else 0.5
        return min(1.0, self._prompts * self.share * part)

    def fill(self, now: float, prompts: float = 1, *, is_unnoticed: bool = False) -> None:
        """Put in the share of the time since the last call in which no step ran.

        Args:
            now: The time.
            prompts: How many wait, of which all that are long count as one.
            is_unnoticed: Chunks end before rows come that would wait for them.
        """
        self._is_unnoticed = is_unnoticed
        if self._filled_at is not None:
            self._purse_s += self._gap_rate * max(0.0, now - self._filled_at - self._ran_s)
        self._filled_at, self._ran_s, self._prompts = now, 0.0, max(1, prompts)

    def prompts_for(self, odds: float) -> float:
        """Return how many prompts have ``odds`` seconds for one of those who decode."""
        return odds * (1 - self.share) / self.share

    def note_step(self, seconds: float, decoding_s: float) -> None:
        """Put in the share of a step.

        Args:
            seconds: What it took.
            decoding_s: What of that it would have taken without its chunk.
        """
        self._ran_s += seconds
        self._purse_s += decoding_s * self._odds

    def rest(self) -> None:
        """Note that no prompt waits: the next one begins at once."""
        self._purse_s = float("inf")

    def choose(
        self, options: Sequence[ChunkOption], usual_s: float, step_s: float, *, in_gap: bool
    ) -> ChunkOption | None:
        """Return the longest chunk that can be paid for now, and take that out.

        Args:
            options: At least one.
            usual_s: How long a chunk takes alone that is long enough for what it reads.
            step_s: How long a step of those who decode takes without a chunk.
            in_gap: No row goes with the chunk.
        """
        smallest_s = min(option.cost_s for option in options)
        full_s = max(usual_s, smallest_s, step_s * self._odds)
        self._purse_s = min(self._purse_s, full_s)
        needed_s = smallest_s if in_gap else full_s
        if self._purse_s + ROUNDING_S < needed_s:
            return None
        paid = [o for o in options if o.cost_s <= self._purse_s + ROUNDING_S]
        chosen = max(paid, key=lambda option: (option.tokens, -option.cost_s))
        self._purse_s -= chosen.cost_s
        return chosen

    def has(self, cost_s: float) -> bool:
        """Return whether so much has been saved since prompts began to wait."""
        return cost_s <= self._purse_s + ROUNDING_S < float("inf")

    def refund(self, cost_s: float) -> None:
        """Put back what a chunk would have cost that found no room."""
        self._purse_s += cost_s

    def pays_at(self, cost_s: float) -> float:
        """Return when the purse will hold ``cost_s`` if no step runs, on the clock of `fill`."""
        assert self._filled_at is not None
        return self._filled_at + max(0.0, cost_s - self._purse_s) / self._gap_rate
