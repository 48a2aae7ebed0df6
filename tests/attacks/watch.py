"""Looks for secrets in what others of the machine can see of commands: M11."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.integration.processes import Pals

LOOK_S = 0.25
"""What is worth looking at runs longer: it has to start an interpreter."""


class Watch:
    """Looks at everything that one `Pals` starts, again and again.

    Attributes:
        command_lines: Every command line that it saw.
        inherited: The environment of each process that another of them started.
        shells: Processes that stand for a user's shell: what they start are the commands.
    """

    def __init__(self, pals: Pals) -> None:
        self._pals = pals
        self._ended = threading.Event()
        self.command_lines: set[bytes] = set()
        self.inherited: dict[int, bytes] = {}
        self.shells: set[int] = set()

    def look(self) -> None:
        """Note what can be seen now."""
        processes = self._pals.processes()
        for pid, command_line in processes.items():
            self.command_lines.add(command_line)
            folder = Path("/proc", str(pid))
            try:
                parent = int(re.findall(r"PPid:\s+(\d+)", (folder / "status").read_text())[0])
                environ = (folder / "environ").read_bytes()
            except (OSError, IndexError):  # it ended meanwhile
                continue
            if parent in processes.keys() - self.shells:
                self.inherited[pid] = environ

    @contextmanager
    def running(self) -> Iterator[None]:
        def repeat() -> None:
            while not self._ended.wait(LOOK_S):
                self.look()

        thread = threading.Thread(target=repeat)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()


def found_in(secrets: Iterable[bytes], *places: bytes) -> list[bytes]:
    """Return the secrets that stand in one of some places."""
    return [secret for secret in secrets if any(secret in place for place in places)]


def assert_files_are_private(folder: Path, secrets: list[bytes]) -> None:
    """Assert that whatever holds a secret is readable by its user alone, and no database."""
    holding = [
        path
        for path in folder.rglob("*")
        if path.is_file() and found_in(secrets, path.read_bytes())
    ]
    assert len(holding) >= 2, "files that hold nothing show nothing"
    for path in holding:
        assert path.stat().st_mode & 0o777 == 0o600, path
        assert path.parent.stat().st_mode & 0o777 == 0o700, path
    assert not [path for path in holding if path.name.startswith("backend.db")]
