"""Shows how far a download is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from pals.cli import console

LINE_EVERY_S = 10.0

OnProgress = Callable[[int, int], None]


@contextmanager
def download_progress(what: str) -> Generator[OnProgress]:
    """Give a function that is told the bytes done and in all; all goes to stderr."""
    if not sys.stderr.isatty():
        yield Lines(what, clock=time.monotonic)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


@contextmanager
def count_progress(what: str, total: int) -> Generator[Callable[[], None]]:
    """Give a function to call after each of ``total`` parts; only a terminal shows them."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    shown = Console(stderr=True)
    with Progress(*columns, console=shown, disable=not shown.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


class Lines:
    """Writes a line at the start, every 10 seconds and at the end."""

    def __init__(self, what: str, clock: Callable[[], float]) -> None:
        self._what = what
        self._clock = clock
        self._start: float | None = None
        self._last = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = self._clock()
        if self._start is None:
            self._start = self._last = now
            console.note(f"{self._what}: {megabytes(total)} to download")
        elif done >= total or now - self._last >= LINE_EVERY_S:
            self._last = now
            console.note(f"{self._what}: {self._state(done, total, now - self._start)}")

    def _state(self, done: int, total: int, elapsed_s: float) -> str:
        rate = done / elapsed_s if elapsed_s else 0.0
        state = f"{megabytes(done)} of {megabytes(total)}, {megabytes(rate)}/s"
        return state + (f", {(total - done) / rate:.0f} s left" if rate and done < total else "")


def megabytes(size_bytes: float) -> str:
    """Return a size as people read it."""
    return f"{size_bytes / 1e6:.1f} MB"
