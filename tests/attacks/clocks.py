"""Gives processes clocks of their own, which a test may move while they run."""

from __future__ import annotations

import os
from pathlib import Path

from tests.attacks.clock.sitecustomize import LAYOUT

FOLDER = Path(__file__).parent / "clock"
DAY_S = 24 * 3600.0


class SystemClock:
    """The clocks of every process that gets `variables`.

    Args:
        path: A file of its own, which those processes read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._wall_s = self._steady_s = 0.0
        path.write_bytes(LAYOUT.pack(0.0, 0.0))

    @property
    def variables(self) -> dict[str, str]:
        paths = [str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"PALS_TEST_CLOCK": str(self._path), "PYTHONPATH": os.pathsep.join(paths)}

    def set_wall(self, offset_s: float) -> None:
        """Let the wall clock be off by so much."""
        self._wall_s = offset_s
        self._write()

    def pass_time(self, seconds: float) -> None:
        """Let time pass on the steady clocks, by which lists age and deadlines come."""
        self._steady_s += seconds
        self._write()

    def _write(self) -> None:
        # Readers see the file through their memory: it is changed, not replaced.
        with self._path.open("r+b") as file:
            file.write(LAYOUT.pack(self._wall_s, self._steady_s))
