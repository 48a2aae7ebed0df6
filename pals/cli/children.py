"""The server processes that `pals demo` starts, and their certain end."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import cast

import msgspec
import trio

from pals import config
from pals.errors import ChildFailed

TERMINATE_S = 3.0
MAX_LINE_BYTES = 1 << 16
LOG_LINES = 20
MAX_EVENTS = 64


class Child:
    """One `pals` process with a JSON line on stdout for each event.

    Attributes:
        name: What it is called in errors.
        log: The last lines it wrote to stderr.
    """

    def __init__(self, name: str, process: trio.Process) -> None:
        self.name = name
        self.log: deque[str] = deque(maxlen=LOG_LINES)
        self._process = process
        self._send, self._events = trio.open_memory_channel[dict[str, object]](MAX_EVENTS)

    async def wait_for_event(self, event: str, *, deadline_s: float) -> dict[str, object]:
        """Return the next document on stdout whose ``event`` is this one.

        Raises:
            ChildFailed: The process ended first, or it took longer than ``deadline_s``.
        """
        with trio.move_on_after(deadline_s):
            async for document in self._events:
                if document.get("event") == event:
                    return document
            raise self._failure(f"it exited with status {self._process.returncode}")
        raise self._failure(f"it was not ready within {deadline_s:g} s")

    async def watch(self) -> None:
        """Collect what the process writes until it ends, and reap it."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read_log)
            await self._read_events()
        await self._process.wait()
        self._send.close()

    async def _read_events(self) -> None:
        async for line in _lines(cast("trio.abc.ReceiveStream", self._process.stdout)):
            with suppress(trio.WouldBlock):
                self._send.send_nowait(_parse(line))

    async def _read_log(self) -> None:
        async for line in _lines(cast("trio.abc.ReceiveStream", self._process.stderr)):
            self.log.append(line.decode(errors="replace"))

    async def end(self) -> None:
        """Ask the process to end, and after `TERMINATE_S` make it."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        with trio.move_on_after(TERMINATE_S):
            await self._process.wait()
            return
        self._process.kill()
        await self._process.wait()

    def _failure(self, problem: str) -> ChildFailed:
        return ChildFailed(name=self.name, problem=problem, log="\n".join(self.log))


class Children:
    """Starts `pals` commands as children; made by `open_children`."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._children: list[Child] = []

    async def start(self, name: str, *arguments: str, config_dir: Path) -> Child:
        """Start ``pals ARGUMENTS`` with a profile of its own."""
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "pals", *arguments, "--config-dir", str(config_dir), "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=config.child_environment({}),
            start_new_session=True,  # Ctrl-C is for the demo, which ends them in order
        )
        child = Child(name, process)
        self._children.append(child)
        self._nursery.start_soon(child.watch)
        return child

    async def end_all(self) -> None:
        async with trio.open_nursery() as nursery:
            for child in self._children:
                nursery.start_soon(child.end)


@asynccontextmanager
async def open_children() -> AsyncGenerator[Children]:
    """Give a starter of children; all of them have ended when the block is left."""
    async with trio.open_nursery() as nursery:
        children = Children(nursery)
        try:
            yield children
        finally:
            with trio.CancelScope(shield=True):
                await children.end_all()
            nursery.cancel_scope.cancel()


async def _lines(stream: trio.abc.ReceiveStream) -> AsyncGenerator[bytes]:
    """Yield the lines of a pipe; one of more than `MAX_LINE_BYTES` is cut."""
    buffer = b""
    async for data in stream:
        *lines, buffer = (buffer + bytes(data)).split(b"\n")
        for line in lines:
            yield line[:MAX_LINE_BYTES]
        buffer = buffer[:MAX_LINE_BYTES]
    if buffer:
        yield buffer


def _parse(line: bytes) -> dict[str, object]:
    try:
        document = msgspec.json.decode(line)
    except msgspec.MsgspecError:
        return {}
    return cast("dict[str, object]", document) if isinstance(document, dict) else {}
