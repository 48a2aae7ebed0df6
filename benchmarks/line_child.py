"""Programs that answer a line of JSON with a line of JSON: what runs beside others in turns.

Threads and huge pages are set before a process starts, and rivals bring runtimes of their
own: so each system has its own process, and one of them works at a time.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TypeVar

import msgspec

from pals import config
from pals.cli.process import HUGE_PAGES, MALLOC_VARIABLE

ANSWER_DEADLINE_S = 600.0
NO_VARIABLES: Mapping[str, str] = MappingProxyType({})

Answer = TypeVar("Answer")
Question = TypeVar("Question")


class LineChild:
    """A running child; made by `open_child`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def ask(self, question: msgspec.Struct, kind: type[Answer]) -> Answer:
        """Let it answer a question.

        Raises:
            BrokenPipeError: It ended, or was ended for taking too long.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        watchdog = threading.Timer(ANSWER_DEADLINE_S, self._process.kill)
        watchdog.start()
        try:
            self._process.stdin.write(msgspec.json.encode(question) + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            raise BrokenPipeError(f"{self._process.args} ended with {self._process.wait()}")
        return msgspec.json.decode(line, type=kind)


@contextmanager
def open_child(
    module: str,
    job: msgspec.Struct,
    *,
    threads: int,
    huge_pages: bool = True,
    variables: Mapping[str, str] = NO_VARIABLES,
) -> Generator[LineChild]:
    """Run ``python -m MODULE JOB`` until the block ends.

    Args:
        module: A program that calls `serve`.
        job: Its one argument.
        threads: That it computes with, whatever it computes with.
        huge_pages: Let glibc ask for them, as `pals shard` does.
        variables: More of its environment.
    """
    environment = {"OMP_NUM_THREADS": str(threads), "XLA_FLAGS": "", **variables}
    if huge_pages:
        environment[MALLOC_VARIABLE] = HUGE_PAGES
    with subprocess.Popen(
        [sys.executable, "-m", module, msgspec.json.encode(job).decode()],
        env=config.child_environment(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the program that ends it
    ) as process:
        try:
            yield LineChild(process)
        finally:
            process.kill()


def serve(kind: type[Question], answer: Callable[[Question], msgspec.Struct]) -> None:
    """Answer the lines of standard input until it ends."""
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(msgspec.json.encode(answer(msgspec.json.decode(line, type=kind))))
        sys.stdout.buffer.write(b"\n")
        sys.stdout.buffer.flush()
