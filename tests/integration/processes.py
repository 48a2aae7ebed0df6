"""`pals` commands as processes of their own, the way a user starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from pals import config

DEADLINE_S = 240.0
END_S = 5.0
MARK_VARIABLE = "PALS_TEST_MARK"
SECRET_VARIABLES = (
    config.SWARM_SECRET_VARIABLE,
    config.INVITE_VARIABLE,
    config.API_KEY_VARIABLE,
    config.DATABASE_URL_VARIABLE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """What one command left behind."""

    status: int
    out: str
    err: str
    took_s: float


@dataclass(slots=True)
class _Lines:
    """The lines of one stream, collected by a thread that ends with the stream."""

    stream: IO[str]
    lines: list[str] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        for line in self.stream:
            with self.changed:
                self.lines.append(line)
                self.changed.notify_all()
        with self.changed:
            self.stream.close()
            self.changed.notify_all()

    def find(self, text: str, deadline_s: float) -> str | None:
        """Return the first line with ``text``, or None when the stream ends without it."""

        def found() -> str | None:
            return next((line for line in self.lines if text in line), None)

        with self.changed:
            self.changed.wait_for(lambda: found() or self.stream.closed, deadline_s)
            return found()

    def text(self) -> str:
        self.thread.join(DEADLINE_S)
        return "".join(self.lines)


class Running:
    """A command that was started; its whole process group ends with the test."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self.pid = process.pid
        self._process = process
        self._out, self._err = _Lines(process.stdout), _Lines(process.stderr)
        self._started_s = time.monotonic()

    def wait_for_note(self, text: str) -> str:
        """Return the first line on stderr that holds ``text``."""
        return self._found(self._err.find(text, DEADLINE_S), text)

    def wait_for_line(self, text: str) -> str:
        """Return the first line on stdout that holds ``text``."""
        return self._found(self._out.find(text, DEADLINE_S), text)

    def wait_for_event(self, event: str) -> dict[str, object]:
        """Return the JSON line on stdout of that event."""
        return json.loads(self.wait_for_line(f'"event":"{event}"'))

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def signal_group(self, number: signal.Signals) -> None:
        """Signal like a terminal does: everybody in the foreground process group."""
        os.killpg(self.pid, number)

    def wait(self, *, within_s: float = DEADLINE_S) -> Finished:
        """Return what it left, or fail when it does not end in time."""
        self._process.wait(within_s)
        return Finished(
            status=self._process.returncode,
            out=self._out.text(),
            err=self._err.text(),
            took_s=time.monotonic() - self._started_s,
        )

    def command_line(self) -> bytes:
        return Path(f"/proc/{self.pid}/cmdline").read_bytes()

    def _found(self, line: str | None, text: str) -> str:
        assert line is not None, f"no {text!r} came; stderr:\n{''.join(self._err.lines)}"
        return line


class Pals:
    """Starts commands in an environment of their own, which marks every process of it."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self.mark = uuid.uuid4().hex
        inherited = {k: v for k, v in os.environ.items() if k not in SECRET_VARIABLES}
        self.environment = inherited | dict(variables) | {MARK_VARIABLE: self.mark}

    def run(self, *arguments: str | Path, stdin: str = "", **variables: str) -> Finished:
        """Run a command to its end."""
        started_s = time.monotonic()
        done = subprocess.run(
            self._command(arguments),
            input=stdin,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        return Finished(
            status=done.returncode,
            out=done.stdout,
            err=done.stderr,
            took_s=time.monotonic() - started_s,
        )

    @contextmanager
    def start(self, *arguments: str | Path, **variables: str) -> Iterator[Running]:
        """Start a command as the leader of a process group."""
        process = subprocess.Popen(
            self._command(arguments),
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        running = Running(process)
        try:
            yield running
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            running.wait()

    def processes(self) -> dict[int, bytes]:
        """Return the process id and command line of everything alive that this started."""
        wanted = f"{MARK_VARIABLE}={self.mark}".encode()
        found: dict[int, bytes] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it ended meanwhile, or is another user's
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_bytes()
        return found

    def _command(self, arguments: Iterable[str | Path]) -> list[str]:
        return [sys.executable, "-m", "pals", *map(str, arguments)]


def assert_refused(done: Finished, status: int, *phrases: str) -> None:
    """Check that a command ended as bad input must: said in words, on stderr, and how to go on."""
    assert done.status == status, done.err
    assert done.out == ""
    assert done.err.count("error: ") == 1
    assert "\nhint: " in done.err
    assert "Traceback" not in done.err
    assert [p for p in phrases if p not in done.err] == [], done.err
