"""Who has which row of the tail's sampler bank."""

from __future__ import annotations

import heapq

from pals.errors import PenaltySlotsTaken

DEFAULT_BANK_SLOTS = 65
"""Row 0, which changes nothing, and one for each of 64 sessions."""


class BankSlots:
    """Hands out the rows of a `Bank` but for row 0, the lowest free one first."""

    def __init__(self, slots: int = DEFAULT_BANK_SLOTS) -> None:
        self._slots = slots
        self._free = list(range(1, slots))
        self._taken: set[int] = set()

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """Return a slot, to be filled by `reset_slot` before its session's first step.

        Raises:
            PenaltySlotsTaken: None is free.
        """
        if not self._free:
            raise PenaltySlotsTaken(slots=self._slots - 1)
        slot = heapq.heappop(self._free)
        self._taken.add(slot)
        return slot

    def give_back(self, slot: int) -> None:
        """Free a slot; one that is not taken, such as 0, stays as it is."""
        if slot in self._taken:
            self._taken.remove(slot)
            heapq.heappush(self._free, slot)

    def clear(self) -> None:
        """Free all of them."""
        self._free = list(range(1, self._slots))
        self._taken.clear()
