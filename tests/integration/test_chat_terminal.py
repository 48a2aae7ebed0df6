"""A conversation at a real terminal: keys in, screen out, Ctrl-C where the kernel sends it."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
DEADLINE_S = 40.0
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
PROGRAM = """
import asyncio, fcntl, sys, termios
from pathlib import Path
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C goes to whoever has this terminal
from pals.cli.chat.conversation import Conversation
from pals.cli.chat.terminal import History, Terminal
from pals.cli.chat.turns import Chat
from tests.fakes import FakeDriver
driver = FakeDriver(["Hel", "lo"], end=None)
with asyncio.Runner() as runner:
    try:
        Chat(driver, Conversation(), Terminal(History(Path(sys.argv[1]))), runner).run()
    except KeyboardInterrupt:
        sys.exit(130)
"""


class Screen:
    """The terminal's other end."""

    def __init__(self, handle: int, process: subprocess.Popen[bytes]) -> None:
        self._handle = handle
        self._process = process
        self._seen = ""

    def type(self, keys: str) -> None:
        os.write(self._handle, keys.encode())

    def wait_for(self, text: str) -> None:
        """Read until a text is shown, and forget all up to it."""
        deadline_s = time.monotonic() + DEADLINE_S
        while text not in self._seen:
            left_s = deadline_s - time.monotonic()
            ready, _, _ = select.select([self._handle], [], [], max(0.0, left_s))
            assert ready, f"no {text!r} after {self._seen!r}"
            self._seen += os.read(self._handle, 4096).decode(errors="replace")
        self._seen = self._seen.partition(text)[2]

    def interrupt(self) -> None:
        """Press Ctrl-C as a user would: long after the program has come to wait for a key.

        Python's readline loses a signal that comes in the moment between the echo of a key
        and the wait for the next; only the next signal wakes it.
        """
        process = psutil.Process(self._process.pid)
        deadline_s = time.monotonic() + DEADLINE_S
        while process.status() != psutil.STATUS_SLEEPING:
            assert time.monotonic() < deadline_s, f"never waited: {process.status()}"
        self.type(CTRL_C)

    def status(self) -> int:
        return self._process.wait(DEADLINE_S)


@contextmanager
def talking(history: Path) -> Iterator[Screen]:
    """Start a conversation with a driver whose answers never end."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(history)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env=os.environ | {"TERM": "xterm", "NO_COLOR": "1"},
        start_new_session=True,
    )
    os.close(theirs)
    try:
        screen = Screen(ours, process)
        screen.wait_for(">>> ")
        yield screen
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.timeout(120)
def test_ctrl_c_stops_an_answer_then_a_line_and_only_then_the_program(tmp_path: Path) -> None:
    history = tmp_path / "profile" / "history.json"
    with talking(history) as screen:
        screen.type("one\r")
        screen.wait_for("Hello")
        screen.interrupt()
        screen.wait_for("stopped")
        screen.wait_for(">>> ")
        screen.type("half a line")
        screen.wait_for("half a line")
        screen.interrupt()
        screen.wait_for(">>> ")
        screen.interrupt()
        screen.wait_for("press Ctrl-C again")
        screen.wait_for(">>> ")
        screen.interrupt()
        assert screen.status() == 130

    assert json.loads(history.read_text()) == ["one"]


@pytest.mark.timeout(120)
def test_what_was_typed_comes_back_with_the_arrow_and_ctrl_d_leaves(tmp_path: Path) -> None:
    history = tmp_path / "history.json"
    history.touch(mode=0o600)
    history.write_text(json.dumps(["/set seed 12"]))
    with talking(history) as screen:
        screen.type(UP)
        screen.wait_for("/set seed 12")
        screen.type("\r")
        screen.wait_for(">>> ")
        screen.type("/set\r")
        screen.wait_for("seed         12")
        screen.wait_for(">>> ")
        screen.type(CTRL_D)
        assert screen.status() == 0
