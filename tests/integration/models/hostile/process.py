"""Starts the loading process and asks it about folders, never waiting without end."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.integration.models.hostile import loader

START_DEADLINE_S = 120.0
HANG_S = 30.0
"""Far beyond the 5 s of CPU that are allowed: other work on this machine may slow it."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How loading one folder ended.

    Attributes:
        error: Name of the exception's class; None where all of it loaded.
        named: It is one of our own errors.
        cpu_s: CPU seconds of the process; those of the text sandbox are its own.
        grown: Bytes by which the process' peak memory grew.
    """

    error: str | None
    named: bool
    message: str
    cpu_s: float
    grown: int


class Loader:
    """One loading process, started again after a folder that hung or killed it."""

    def __init__(self, root: Path, cache: Path) -> None:
        self.root = root
        self.cache = cache
        self._process: subprocess.Popen[bytes] | None = None

    def load(self, folder: Path, *, layers: str = "0:2", dtype: str = "f32") -> Outcome:
        """Load a folder; a process that gives no answer is an outcome too."""
        process = self._running()
        request = {"folder": str(folder), "layers": layers, "dtype": dtype}
        answer = self._ask(process, json.dumps(request), HANG_S)
        if answer is None:
            self.close()
            return Outcome(error="no answer", named=False, message="", cpu_s=HANG_S, grown=0)
        return Outcome(**json.loads(answer))

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", loader.__name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=self.root,
                env=os.environ
                | {
                    "PALS_CACHE_DIR": str(self.cache),
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "JAX_PLATFORMS": "cpu",
                },
            )
            # a folder that is not there: from here on everything is imported
            warm = {"folder": str(self.root / "none"), "layers": "0:1", "dtype": "f32"}
            assert self._ask(self._process, json.dumps(warm), START_DEADLINE_S) is not None
        return self._process

    @staticmethod
    def _ask(process: subprocess.Popen[bytes], request: str, deadline_s: float) -> bytes | None:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(request.encode() + b"\n")
        process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            return (process.stdout.readline() or None) if selector.select(deadline_s) else None
