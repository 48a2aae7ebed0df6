"""What the compute thread runs next: all waiting decode rows, or one prompt chunk.

Plain Python without jax, and without a clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pals.errors import QueueFull
from pals.types import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkItem:
    """One row for the shard to run.

    Attributes:
        session: Opaque key; the items of one session run in the order of their arrival.
        slot: The session's place in the KV cache.
        position: Position of the first token.
        inputs: ``int32[T]`` token ids at the head, else ``[T, D]`` in the wire dtype.
        sampling: At the tail, how to sample after the last token; None for a prompt
            chunk that is not the last one, and at every other shard.
        is_decode: A single token that continues the session; prompt chunks are prefill.
        arrived_s: When the row arrived, on the clock of the caller.
        codec_s: Seconds that opening its frame took.
    """

    session: Hashable
    slot: int
    position: int
    inputs: npt.NDArray[np.generic]
    sampling: Sampling | None
    is_decode: bool
    arrived_s: float
    codec_s: float


@dataclass(slots=True, kw_only=True)
class Scheduler:
    """Two bounded queues, served in turn so that neither waits for all of the other.

    Attributes:
        max_rows: Most decode rows of one step.
        max_bytes: Most bytes of inputs that wait at one time.
    """

    max_rows: int
    max_bytes: int
    _decode: deque[WorkItem] = field(default_factory=deque[WorkItem])
    _prefill: deque[WorkItem] = field(default_factory=deque[WorkItem])
    _bytes: int = 0
    _prefill_next: bool = False

    def add(self, item: WorkItem) -> None:
        """Queue one row.

        Raises:
            QueueFull: Its inputs would exceed `max_bytes`.
        """
        if self._bytes + item.inputs.nbytes > self.max_bytes:
            raise QueueFull(queue="step", limit=f"{self.max_bytes} bytes")
        self._bytes += item.inputs.nbytes
        # A decode row that is ahead of its own prompt waits in line behind it.
        is_early = any(item.session == waiting.session for waiting in self._prefill)
        (self._decode if item.is_decode and not is_early else self._prefill).append(item)

    def next_step(self) -> list[WorkItem]:
        """Return the rows of the next step: decode rows, or a single chunk, or nothing."""
        use_prefill = bool(self._prefill) and (self._prefill_next or not self._decode)
        step = [self._prefill.popleft()] if use_prefill else self._take_decode()
        self._prefill_next = not use_prefill
        self._bytes -= sum(item.inputs.nbytes for item in step)
        return step

    def drop(self, session: Hashable) -> None:
        """Forget the waiting rows of a session, whose slot may then go to another."""
        for queue in (self._decode, self._prefill):
            kept = [item for item in queue if item.session != session]
            self._bytes -= sum(i.inputs.nbytes for i in queue) - sum(i.inputs.nbytes for i in kept)
            queue.clear()
            queue.extend(kept)

    def _take_decode(self) -> list[WorkItem]:
        count = min(len(self._decode), self.max_rows)
        return [self._decode.popleft() for _ in range(count)]

    def __len__(self) -> int:
        return len(self._decode) + len(self._prefill)
