"""How fast this machine reads memory: the limit of a step that reads each weight once."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

READ_BYTES = 512 << 20
"""Far beyond any cache."""

READS = 3


def _find_largest(values: npt.NDArray[np.float32]) -> object:
    return np.max(values)


def _find_any(values: npt.NDArray[np.float32]) -> object:
    return np.any(values.view(np.bool_))  # all are 0, so it reads to the end


READERS = (_find_largest, _find_any)
"""Which one is faster depends on the processor; numpy lets other threads run in both."""


class ReadLimit:
    """Reads the same memory again and again, with some threads.

    Args:
        threads: As many as the step that is held against it has.
        size_bytes: That is read each time.
    """

    def __init__(self, threads: int, size_bytes: int = READ_BYTES) -> None:
        values = np.empty(size_bytes // 4, np.float32)
        values.fill(0)  # else all of it would be the same page of zeros
        self._parts = np.array_split(values, threads)
        self._pool = ThreadPoolExecutor(threads)

    def measure(self) -> float:
        """Return the bytes per second of the fastest of a few readings."""
        return max(self._read(reader) for reader in READERS for _ in range(READS))

    def _read(self, reader: Callable[[npt.NDArray[np.float32]], object]) -> float:
        started_s = time.perf_counter()
        list(self._pool.map(reader, self._parts))
        return sum(part.nbytes for part in self._parts) / (time.perf_counter() - started_s)
