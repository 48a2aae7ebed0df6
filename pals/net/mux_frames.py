"""The frames of the muxer: yamux's format, with no more than the bytes.

Bytes of a frame, integers big-endian::

    header = version 0 (1) || type (1) || flags (2) || stream id (4) || length (4)
    DATA           length bytes of one stream follow
    WINDOW_UPDATE  length is how many bytes more may be sent on the stream
    PING           length is a value that the answer repeats; stream id 0
    GO_AWAY        length is the reason; stream id 0; nothing follows it

Whoever dialled opens odd stream ids, the other side even ones, each in rising order.

Source: hashicorp/yamux, spec.md.
"""

from __future__ import annotations

import struct

HEADER = struct.Struct(">BBHII")
HEADER_BYTES = HEADER.size

DATA = 0
WINDOW_UPDATE = 1
PING = 2
GO_AWAY = 3

SYN = 1
ACK = 2
FIN = 4
RST = 8
ALL_FLAGS = SYN | ACK | FIN | RST

NORMAL = 0
PROTOCOL_ERROR = 1
INTERNAL_ERROR = 2

INITIAL_WINDOW_BYTES = 256 << 10
"""What either side may send on a stream before any window update."""
MAX_WINDOW = (1 << 32) - 1


def pack_header(kind: int, flags: int, stream_id: int, length: int) -> bytes:
    """Return the 12 bytes that begin a frame."""
    return HEADER.pack(0, kind, flags, stream_id, length)
