"""What carries a connection's bytes: a TCP socket, or anything else that libp2p calls raw.

A socket is written without a turn of the scheduler where none is needed; a relayed
connection, which has no socket of its own, in a task.
"""

# pyright: reportMissingTypeStubs=false
# Reason: parts of libp2p ship no types.

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol, TypeVar

import trio
from libp2p.abc import IRawConnection
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection

from pals.types import Buffer

UNSENT_BYTES = 128 << 10
"""What the system takes beyond what is on its way, so that little stands before a token."""

CLOSE_S = 1.0

Result = TypeVar("Result")


class PipeBroken(Exception):
    """The connection is gone."""


class Pipe(Protocol):
    """The bytes of one connection, in both directions."""

    def send_now(self, buffers: Sequence[Buffer]) -> list[Buffer]:
        """Send what goes out at once and return what is left, all of it if need be.

        Raises:
            PipeBroken: The connection is gone.
        """
        ...

    async def send(self, buffers: Sequence[Buffer]) -> list[Buffer]:
        """Wait until more goes out, and return what is left.

        Raises:
            PipeBroken: The connection is gone.
        """
        ...

    async def receive(self, space: memoryview) -> int:
        """Wait for bytes, put them at the start of ``space`` and return how many, 0 at the end.

        Raises:
            PipeBroken: The connection is gone.
        """
        ...

    def abort(self) -> None:
        """Close the connection at once."""
        ...


class SocketPipe:
    """A TCP connection. Its number is asked for each time: after a close it is another's."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._socket = stream.socket
        if hasattr(socket, "TCP_NOTSENT_LOWAT") and self._socket.family != socket.AF_UNIX:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)

    def send_now(self, buffers: Sequence[Buffer]) -> list[Buffer]:
        try:
            sent = os.writev(self._socket.fileno(), buffers)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise PipeBroken(str(error)) from error
        return _rest(buffers, sent)

    async def send(self, buffers: Sequence[Buffer]) -> list[Buffer]:
        await self._wait(trio.lowlevel.wait_writable)
        return self.send_now(buffers)

    async def receive(self, space: memoryview) -> int:
        while True:
            await self._wait(trio.lowlevel.wait_readable)
            try:
                return os.readv(self._socket.fileno(), [space])
            except BlockingIOError:
                continue
            except OSError as error:
                raise PipeBroken(str(error)) from error

    def abort(self) -> None:
        self._socket.close()

    async def _wait(self, wait: Callable[[int], Awaitable[None]]) -> None:
        number = self._socket.fileno()
        if number < 0:  # trio would take it for one file that all closed sockets share
            raise PipeBroken("the connection was closed")
        try:
            await wait(number)
        except (trio.ClosedResourceError, OSError) as error:
            raise PipeBroken("the connection was closed") from error


class RawPipe:
    """Any raw connection; it is written by one task at a time, and never half-way."""

    def __init__(self, raw: IRawConnection) -> None:
        self._raw = raw
        self._is_aborted = False

    def send_now(self, buffers: Sequence[Buffer]) -> list[Buffer]:
        return list(buffers)

    async def send(self, buffers: Sequence[Buffer]) -> list[Buffer]:
        await self._run(partial(self._raw.write, b"".join(buffers)))
        return []

    async def receive(self, space: memoryview) -> int:
        received = await self._run(partial(self._raw.read, len(space)))
        space[: len(received)] = received
        return len(received)

    def abort(self) -> None:
        """Close the connection as soon as the task that uses it comes to it."""
        self._is_aborted = True
        trio.lowlevel.spawn_system_task(self._close)

    async def _close(self) -> None:
        with suppress(Exception), trio.move_on_after(CLOSE_S):
            await self._raw.close()

    async def _run(self, call: Callable[[], Awaitable[Result]]) -> Result:
        if self._is_aborted:
            raise PipeBroken("the connection was closed")
        try:
            return await call()
        except (BaseLibp2pError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise PipeBroken(str(error)) from error


def open_pipe(raw: IRawConnection) -> Pipe:
    """Return the pipe of a connection: straight to its socket where it is one."""
    if isinstance(raw, RawConnection) and isinstance(raw.stream, TrioTCPStream):
        return SocketPipe(raw.stream.stream)
    return RawPipe(raw)


def _rest(buffers: Sequence[Buffer], sent: int) -> list[Buffer]:
    """Return what is left of ``buffers`` when their first ``sent`` bytes are gone."""
    for index, buffer in enumerate(buffers):
        if sent < len(buffer):
            return [memoryview(buffer)[sent:], *buffers[index + 1 :]]
        sent -= len(buffer)
    return []
