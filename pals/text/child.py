"""The killable process that runs templates, tokenizers and grammars: its parent's side."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable

import msgspec

from pals.errors import PalsError
from pals.text import sandbox

START_DEADLINE_S = 30.0
ENDED = "the process that runs it was ended"

MakeError = Callable[[str], PalsError]
"""Makes the error to raise of a problem in words."""


class TextChild:
    """One `sandbox` process; safe to use from any thread.

    The process lives as long as this object. One that was stopped for exceeding its limits
    is started again at the next request, and loads again what the last one had loaded.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: dict[bytes, tuple[bytes, float]] = {}
        self._process: _Process | None = None
        self._times_closed = 0

    def load(self, kind: bytes, content: bytes, deadline_s: float, error: MakeError) -> None:
        """Load a template, a tokenizer or a vocabulary, in place of an earlier one.

        Args:
            kind: One of sandbox's ``LOAD_…``.
            content: Its source.
            deadline_s: Longest wait, the start of the process apart.
            error: What to raise when it does not load.
        """
        with self._lock:
            self._running(error).ask(kind + content, deadline_s, error)
            self._loaded[kind] = content, deadline_s

    def ask(
        self,
        kind: bytes,
        content: bytes,
        deadline_s: float,
        error: MakeError,
        *,
        again: bool = False,
    ) -> sandbox.Answer:
        """Send one request and return its answer; a child that gives none is stopped.

        Args:
            kind: Of the request.
            content: Of it.
            deadline_s: Longest wait, the start of a process apart.
            error: Makes what is raised of a problem: its own, or that there was none in time.
            again: Ask a new process when one that ran before ended without an answer, which
                need not have been this request's fault.
        """
        with self._lock:
            was_running = self._process is not None and self._process.alive
            times_closed = self._times_closed
            process = self._running(error)
            if again and was_running:
                try:
                    return process.ask(kind + content, deadline_s, error, ended=_Ended)
                except _Ended:
                    if times_closed != self._times_closed:
                        raise error(ENDED) from None
            return self._running(error).ask(kind + content, deadline_s, error)

    def close(self) -> None:
        """End the process now, without an answer for who waits; a later request starts another."""
        self._times_closed += 1
        process = self._process
        if process is None:
            return
        if self._lock.acquire(blocking=False):
            try:
                process.stop()
            finally:
                self._lock.release()
        else:  # whoever reads from it has to close what it reads from
            process.kill()

    def _running(self, error: MakeError) -> _Process:
        if self._process is None or not self._process.alive:
            self._process = _Process()
            try:
                self._begin(self._process, error)
            except BaseException:  # half of what it has to know is as good as nothing
                self._process.stop()
                raise
        return self._process

    def _begin(self, process: _Process, error: MakeError) -> None:
        process.ask(sandbox.START, START_DEADLINE_S, error)
        for kind, (content, deadline_s) in self._loaded.items():
            process.ask(kind + content, deadline_s, error)


class _Ended(Exception):
    """A process ended without an answer."""

    def __init__(self, _: str) -> None:
        super().__init__()


class _Process:
    """One run of the sandbox and the socket to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(  # noqa: S603 our own file, no shell
                [sys.executable, "-I", sandbox.__file__],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_child_environment(),
            )
        self._socket = ours
        self.kill = process.kill
        self.stop = weakref.finalize(self, _stop, process, ours)

    @property
    def alive(self) -> bool:
        return self.stop.alive

    def ask(
        self,
        request: bytes,
        deadline_s: float,
        error: MakeError,
        ended: Callable[[str], Exception] | None = None,
    ) -> sandbox.Answer:
        """Return the answer to a request; an empty one says that the process has started.

        ``ended`` makes what is raised when the process has ended, by default ``error`` does.
        """
        self._socket.settimeout(deadline_s)
        try:
            sandbox.send(self._socket, request)
            answer = msgspec.json.decode(sandbox.receive(self._socket), type=sandbox.Answer)
        except TimeoutError:
            self.stop()
            raise error(f"no result within {deadline_s:.1f} s") from None
        except (OSError, EOFError, ValueError):
            self.stop()
            raise (ended or error)(ENDED) from None
        if answer["problem"] is not None:
            raise error(answer["problem"])
        return answer


def _child_environment() -> dict[str, str]:
    """Return what a Python needs to start and to know the local time, and no secret."""
    names = ("LD_LIBRARY_PATH", "TZ")
    found = {name: os.environ[name] for name in names if name in os.environ}
    # threads would only count against the limits of a process that encodes one text at a time
    return found | {"TOKENIZERS_PARALLELISM": "false"}


def _stop(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()
