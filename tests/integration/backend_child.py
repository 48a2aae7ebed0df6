"""A membership service in a process of its own, which can be killed at any step.

The parent writes one operation a line and reads one outcome a line.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import msgspec

from pals.backend.service import BackendService
from pals.types import SwarmId
from tests.unit.backend.crashing import Died, Operation, Outcome, Tripwire, perform


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """An operation, or the wish for a swarm's list."""

    operation: Operation | None = None
    die_at: int | None = None
    entries_of: bytes = b""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it."""

    outcome: Outcome = Outcome()
    entries: tuple[bytes, ...] = ()


class Child:
    """The parent's side: a `tests.unit.backend.crashing.Crashing` by SIGKILL."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._start()

    def call(self, operation: Operation, die_at: int | None = None) -> Outcome:
        answer = self._ask(Ask(operation=operation, die_at=die_at))
        if answer is None:
            self._process.communicate()
            assert self._process.returncode == -signal.SIGKILL
            self._start()
            raise Died
        return answer.outcome

    def entries(self, swarm_id: SwarmId) -> tuple[bytes, ...]:
        answer = self._ask(Ask(entries_of=swarm_id))
        assert answer is not None
        return answer.entries

    def crash(self) -> None:
        self.close()
        self._start()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, ask: Ask) -> Answer | None:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(msgspec.json.encode(ask) + b"\n")
        stdin.flush()
        line = stdout.readline()
        return msgspec.json.decode(line, type=Answer) if line else None

    def _start(self) -> None:
        command = [sys.executable, "-m", __name__, self._url]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def main(url: str) -> None:
    """Serve the parent until it goes away."""
    now = 0.0
    service = BackendService(url, clock=lambda: now)
    wire = Tripwire(service._engine, lambda: os.kill(os.getpid(), signal.SIGKILL))
    for line in sys.stdin.buffer:
        ask = msgspec.json.decode(line, type=Ask)
        if ask.operation is None:
            listed = service.entries(SwarmId(ask.entries_of)).entries
            answer = Answer(entries=listed or ())
        else:
            now = ask.operation.now
            wire.arm(ask.die_at)
            answer = Answer(outcome=perform(service, ask.operation))
            wire.spring()
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1])
