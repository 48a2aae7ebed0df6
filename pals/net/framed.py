"""Messages on a stream: a 4-byte length, and as many bytes."""

from __future__ import annotations

from typing import Protocol

from pals.errors import InvalidRecord
from pals.types import Buffer

LENGTH_BYTES = 4


class MessageStream(Protocol):
    """The part of `pals.net.host.Stream` that messages need."""

    async def read_exactly(self, n: int) -> bytes: ...

    async def write(self, data: Buffer) -> None: ...


async def write_message(stream: MessageStream, message: bytes) -> None:
    """Write one message; raises `PeerUnreachable` like the stream."""
    await stream.write(len(message).to_bytes(LENGTH_BYTES, "big") + message)


async def read_message(stream: MessageStream, *, max_bytes: int) -> bytes:
    """Read one message, of which nothing is read when it is announced as too long.

    Raises:
        InvalidRecord: It is said to be longer than ``max_bytes``.
        PeerUnreachable: The stream ended before its end.
    """
    size = int.from_bytes(await stream.read_exactly(LENGTH_BYTES), "big")
    if size > max_bytes:
        raise InvalidRecord(kind="message", problem=f"{size} bytes, more than {max_bytes}")
    return await stream.read_exactly(size)
