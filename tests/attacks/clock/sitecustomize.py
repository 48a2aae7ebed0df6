"""Other clocks for a whole process and all that it starts, from before its first import.

Python imports this by its name where ``PYTHONPATH`` has this folder. The file that
``PALS_TEST_CLOCK`` names holds two doubles: by how many seconds the wall clock is off, and
how many more the steady clocks count. Whoever writes it moves the clocks of what runs.

`datetime` keeps its own present: its type is compared with and cannot be replaced, and the
program asks it for the time nowhere but in the sandbox of chat templates.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable

LAYOUT = struct.Struct("<dd")
NS_PER_S = 1_000_000_000


def install(path: str) -> None:
    """Have every clock of this process follow a file."""
    with open(path, "rb") as file:
        offsets = mmap.mmap(file.fileno(), LAYOUT.size, prot=mmap.PROT_READ)

    def wall_s() -> float:
        return LAYOUT.unpack(offsets)[0]

    def steady_s() -> float:
        return LAYOUT.unpack(offsets)[1]

    time.time = shifted(time.time, wall_s)
    time.time_ns = shifted_ns(time.time_ns, wall_s)
    for name in ("monotonic", "perf_counter"):
        setattr(time, name, shifted(getattr(time, name), steady_s))
        in_ns = f"{name}_ns"
        setattr(time, in_ns, shifted_ns(getattr(time, in_ns), steady_s))


def shifted(clock: Callable[[], float], offset_s: Callable[[], float]) -> Callable[[], float]:
    return lambda: clock() + offset_s()


def shifted_ns(clock: Callable[[], int], offset_s: Callable[[], float]) -> Callable[[], int]:
    return lambda: clock() + int(offset_s() * NS_PER_S)


if path := os.environ.get("PALS_TEST_CLOCK"):
    install(path)
