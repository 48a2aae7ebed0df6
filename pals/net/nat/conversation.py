"""Messages on a stream: one question, one answer, each with a deadline."""

from __future__ import annotations

from typing import TypeVar

import trio

from pals.errors import InvalidFrame, PeerUnreachable
from pals.net.host import Stream
from pals.net.nat.addresses import Endpoint
from pals.net.nat.messages import (
    LENGTH,
    MAX_MESSAGE_BYTES,
    Message,
    Refused,
    decode_message,
    encode_message,
)

MESSAGE_DEADLINE_S = 5.0
END_S = 1.0

_M = TypeVar("_M", bound=Message)


async def send_message(stream: Stream, message: Message) -> None:
    """Write one message.

    Raises:
        PeerUnreachable: The stream is gone.
    """
    await stream.write(encode_message(message))


async def read_message(stream: Stream, *, within_s: float = MESSAGE_DEADLINE_S) -> Message:
    """Read one message.

    Raises:
        PeerUnreachable: None came in time, or the stream is gone.
        InvalidFrame: It is no message, or too long.
    """
    with trio.move_on_after(within_s):
        (length,) = LENGTH.unpack(await stream.read_exactly(LENGTH.size))
        if length > MAX_MESSAGE_BYTES:
            raise InvalidFrame(peer=stream.peer_id, problem=f"a message of {length} bytes")
        return decode_message(stream.peer_id, await stream.read_exactly(length))
    raise PeerUnreachable(peer=stream.peer_id, problem=f"no answer within {within_s:g} s")


async def read_expected(
    stream: Stream, kind: type[_M], *, within_s: float = MESSAGE_DEADLINE_S
) -> _M:
    """Read the message that comes next in a protocol.

    Raises:
        PeerUnreachable: The other side refuses, with its reason; or none came in time.
        InvalidFrame: It is another one.
    """
    message = await read_message(stream, within_s=within_s)
    if isinstance(message, Refused):
        raise PeerUnreachable(peer=stream.peer_id, problem=message.problem)
    if not isinstance(message, kind):
        name = type(message).__name__
        raise InvalidFrame(peer=stream.peer_id, problem=f"an unexpected message, {name}")
    return message


def endpoint_from(stream: Stream, text: str) -> Endpoint:
    """Read an endpoint that the other side names.

    Raises:
        InvalidFrame: It is none.
    """
    try:
        return Endpoint.parse(text)
    except ValueError as error:
        raise InvalidFrame(peer=stream.peer_id, problem=str(error)) from error


async def end_stream(stream: Stream) -> None:
    """Reset a stream, even when the caller is being cancelled."""
    with trio.move_on_after(END_S, shield=True):
        await stream.reset()
