"""The bytes of a frame: a fixed header that is the whole AAD, and a sealed body.

The header states everything a receiver can know beforehand; the receiver builds the
header it expects and compares before anything is decrypted. The sealed body starts
with the row table, one `Row` for each session that travels in the frame, followed by
the payload: token ids, or hidden states of all rows one after another.

Bytes of a frame, integers of header and rows big-endian, elements little-endian::

    header = "PALS" || wire version (1) || lane (1) || kind (1) || dtype (1) || codec (1)
             || swarm id (its first 16) || epoch (8) || link id (16) || counter (8)
             || manifest (32) || boundary (2) || row count (2) || body bytes (4)
    row    = session (16) || position (4) || tokens (2) || flags (2)
    body   = row || row ... || payload
    frame  = header || AES-256-GCM(body, AAD header), 16 bytes longer than the body

Pure functions over bytes; `InvalidFrame` is the only error they raise on bad input.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache

import ml_dtypes
import numpy as np
import numpy.typing as npt

from pals.errors import InvalidFrame
from pals.types import ActivationDtype, Dtype, PeerId, SessionId, activation_dtype

WIRE_VERSION = 3
MAGIC = b"PALS"
MAX_ROWS = 256
MAX_ROW_TOKENS = 512
MAX_BODY_BYTES = 64 << 20
MAX_CONTROL_BYTES = 1 << 20
MAX_KEY_BYTES = 256
NO_MANIFEST = bytes(32)

_HEADER = struct.Struct(">4sBBBBB16sQ16sQ32sHHI")
_ROW_FORMAT = "16sIHH"
HEADER_BYTES = _HEADER.size
ROW_BYTES = struct.calcsize(">" + _ROW_FORMAT)


class Lane(IntEnum):
    """The stream a frame travels on; each lane has its own key and counter."""

    CONTROL = 0
    DECODE = 1
    PREFILL = 2


class Kind(IntEnum):
    """What the payload is."""

    CONTROL = 0
    """A control message; there is no row table."""
    TOKENS = 1
    """Token ids on their way into the head."""
    HIDDEN = 2
    """Hidden states ``[sum(num_tokens), D]`` between two shards."""
    SAMPLED = 3
    """Token ids that the tail sampled, on their way to the driver."""
    KEY = 4
    """A message of the link itself about its keys; there is no row table."""
    SCORED = 5
    """Sampled token ids with log-probabilities, on their way to the driver."""
    POOLED = 6
    """Means of the hidden states of whole prompts, on their way to the driver."""


class WireDtype(IntEnum):
    """Element type of the payload, little-endian."""

    NONE = 0
    INT32 = 1
    BF16 = 2
    F32 = 3


_WIRE_DTYPES: dict[ActivationDtype, WireDtype] = {
    "bf16": WireDtype.BF16,
    "f32": WireDtype.F32,
}
NUMPY_DTYPES = {
    WireDtype.INT32: np.dtype("<i4"),
    WireDtype.BF16: np.dtype(ml_dtypes.bfloat16),
    WireDtype.F32: np.dtype("<f4"),
}


class Codec(IntEnum):
    """How the elements of hidden states are written."""

    RAW = 0
    """In the dtype of the frame."""
    INT8 = 1
    """As 8-bit integers with a scale for each block; see `pals.net.codec`."""


INT8_BLOCK = 32
"""Elements that share a scale."""
SCALE_BYTES = 2
FLAG_LAST = 1
"""Set on a sampled row after which the tail stops the session by itself."""
TOP_LOGPROBS = 20
"""Alternatives that a scored token names."""
SCORED_WIDTH = 2 + 2 * TOP_LOGPROBS
"""Words of a scored token: its id, its log-probability, the ids of the likeliest tokens, and
their log-probabilities. Those are the bits of float32; an alternative that is not there has
the id -1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameShape:
    """What the payload of a frame is and where it enters the model.

    Attributes:
        kind: What the payload is.
        dtype: Element type of the payload.
        boundary: The first layer that the payload enters: 0 for token ids, the
            receiving shard's ``start`` for hidden states, ``num_layers`` for sampled ids.
        manifest: The model's manifest, 32 bytes; zeros for control frames.
        width: Elements of one token: ``D`` for hidden states and means, 1 for ids, 42 for
            scored ones, 0 for control.
        codec: How the elements are written.
        token_bytes: Bytes of one token on the wire.
        raw_token_bytes: Bytes of one token's elements once they are decoded.
    """

    kind: Kind
    dtype: WireDtype
    boundary: int
    manifest: bytes
    width: int
    codec: Codec = Codec.RAW

    token_bytes: int = field(init=False, repr=False, compare=False)
    raw_token_bytes: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Both are asked for in every frame, and a shape lives as long as what it describes.
        raw = self.width * NUMPY_DTYPES[self.dtype].itemsize if self.width else 0
        coded = self.width + SCALE_BYTES * -(-self.width // INT8_BLOCK)
        object.__setattr__(self, "raw_token_bytes", raw)
        object.__setattr__(self, "token_bytes", coded if self.codec is Codec.INT8 else raw)


CONTROL_SHAPE = FrameShape(
    kind=Kind.CONTROL, dtype=WireDtype.NONE, boundary=0, manifest=NO_MANIFEST, width=0
)
KEY_SHAPE = FrameShape(
    kind=Kind.KEY, dtype=WireDtype.NONE, boundary=0, manifest=NO_MANIFEST, width=0
)


def tokens_shape(manifest: bytes) -> FrameShape:
    """Return the shape of token ids on their way into the head."""
    return FrameShape(
        kind=Kind.TOKENS, dtype=WireDtype.INT32, boundary=0, manifest=manifest, width=1
    )


def hidden_shape(manifest: bytes, boundary: int, dtype: Dtype, hidden_size: int) -> FrameShape:
    """Return the shape of hidden states that enter at layer ``boundary``."""
    return FrameShape(
        kind=Kind.HIDDEN,
        dtype=_WIRE_DTYPES[activation_dtype(dtype)],
        boundary=boundary,
        manifest=manifest,
        width=hidden_size,
    )


def sampled_shape(manifest: bytes, num_layers: int) -> FrameShape:
    """Return the shape of what a tail sends to a driver."""
    return FrameShape(
        kind=Kind.SAMPLED,
        dtype=WireDtype.INT32,
        boundary=num_layers,
        manifest=manifest,
        width=1,
    )


def scored_shape(manifest: bytes, num_layers: int) -> FrameShape:
    """Return the shape of what a tail sends to a driver that wants log-probabilities."""
    return FrameShape(
        kind=Kind.SCORED,
        dtype=WireDtype.INT32,
        boundary=num_layers,
        manifest=manifest,
        width=SCORED_WIDTH,
    )


def pooled_shape(manifest: bytes, num_layers: int, hidden_size: int) -> FrameShape:
    """Return the shape of what a tail sends to a driver that wants embeddings."""
    return FrameShape(
        kind=Kind.POOLED,
        dtype=WireDtype.F32,
        boundary=num_layers,
        manifest=manifest,
        width=hidden_size,
    )


@dataclass(frozen=True, slots=True)
class Row:
    """One session's part of a frame: ``num_tokens`` tokens from ``position`` on."""

    session: SessionId
    position: int
    num_tokens: int
    flags: int = 0


@dataclass(frozen=True, slots=True)
class Rows:
    """The row table of a frame by columns, each with one entry a row.

    A hot path takes whole columns; iterating makes a `Row` for each.
    """

    sessions: tuple[SessionId, ...] = ()
    positions: tuple[int, ...] = ()
    num_tokens: tuple[int, ...] = ()
    flags: tuple[int, ...] = ()

    @classmethod
    def of(cls, *rows: Row) -> Rows:
        """Return the table of a few rows."""
        return cls(
            tuple(row.session for row in rows),
            tuple(row.position for row in rows),
            tuple(row.num_tokens for row in rows),
            tuple(row.flags for row in rows),
        )

    def __len__(self) -> int:
        return len(self.sessions)

    def __iter__(self) -> Iterator[Row]:
        return map(Row, self.sessions, self.positions, self.num_tokens, self.flags)


NO_ROWS = Rows()
"""What a control frame has."""

Payload = tuple[bytes | memoryview, ...]
"""Buffers of bytes that follow one another on the wire; see `buffer_of`."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A frame to send; its buffers are read once, when it is sealed, and must not change."""

    shape: FrameShape
    rows: Rows
    payload: Payload


def buffer_of(array: npt.NDArray[np.generic]) -> memoryview:
    """Return the bytes of an array, without a copy if it is contiguous.

    Args:
        array: Elements in the dtype and byte order of the wire, ``[T, D]`` or ``[T]``.
    """
    # A bfloat16 array is no buffer itself, but its bytes are.
    return array.reshape(-1).view(np.uint8).data


@dataclass(frozen=True, slots=True)
class Frame:
    """An opened frame. ``payload`` is a view into the decrypted body."""

    lane: Lane
    shape: FrameShape
    rows: Rows
    payload: memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkAddress:
    """The header fields that are fixed for a link: swarm (16 bytes), epoch, link id."""

    swarm: bytes
    epoch: int
    link: bytes


@dataclass(frozen=True, slots=True)
class FrameHead:
    """What a checked header says about the bytes that follow it."""

    shape: FrameShape
    row_count: int
    body_bytes: int


def pack_header(
    address: LinkAddress, lane: Lane, counter: int, shape: FrameShape, row_count: int, body: int
) -> bytes:
    """Return the header of a frame, which is also its AAD."""
    return _HEADER.pack(
        MAGIC,
        WIRE_VERSION,
        lane,
        shape.kind,
        shape.dtype,
        shape.codec,
        address.swarm,
        address.epoch,
        address.link,
        counter,
        shape.manifest,
        shape.boundary,
        row_count,
        body,
    )


def check_header(
    data: bytes,
    *,
    peer: PeerId,
    address: LinkAddress,
    lane: Lane,
    counter: int,
    accepted: Sequence[FrameShape],
) -> FrameHead:
    """Compare a received header with the ones this lane may carry now.

    Args:
        data: Exactly `HEADER_BYTES` bytes.
        peer: The sender, named in errors.
        address: The link's own fields.
        lane: The lane that the bytes came on.
        counter: The number of frames received on this lane so far.
        accepted: The shapes that this process takes on this lane.

    Raises:
        InvalidFrame: The header is not an expected one, or states an impossible size.
    """
    *_, row_count, body_bytes = _HEADER.unpack(data)
    for shape in accepted:
        if data == pack_header(address, lane, counter, shape, row_count, body_bytes):
            _check_size(peer, shape, row_count, body_bytes)
            return FrameHead(shape, row_count, body_bytes)
    raise InvalidFrame(peer=peer, problem=_describe_mismatch(data, address, lane, counter))


def _check_size(peer: PeerId, shape: FrameShape, row_count: int, body_bytes: int) -> None:
    if shape.kind in (Kind.CONTROL, Kind.KEY):
        lowest = 1
        highest = MAX_KEY_BYTES if shape.kind is Kind.KEY else MAX_CONTROL_BYTES
        rows_ok = row_count == 0
    else:
        lowest = row_count * (ROW_BYTES + shape.token_bytes)
        tokens = min(row_count * MAX_ROW_TOKENS, MAX_BODY_BYTES // shape.raw_token_bytes)
        highest = min(row_count * ROW_BYTES + tokens * shape.token_bytes, MAX_BODY_BYTES)
        rows_ok = 1 <= row_count <= MAX_ROWS
    if not rows_ok or not lowest <= body_bytes <= highest:
        raise InvalidFrame(peer=peer, problem=f"{row_count} rows in {body_bytes} bytes")


def _describe_mismatch(data: bytes, address: LinkAddress, lane: Lane, counter: int) -> str:
    magic, version, got_lane, kind, dtype, codec, swarm, epoch, link, got_counter, *rest = (
        _HEADER.unpack(data)
    )
    expected = {
        "magic": (magic, MAGIC),
        "version": (version, WIRE_VERSION),
        "lane": (got_lane, int(lane)),
        "swarm": (swarm.hex(), address.swarm.hex()),
        "epoch": (epoch, address.epoch),
        "link": (link.hex(), address.link.hex()),
        "counter": (got_counter, counter),
    }
    for name, (got, wanted) in expected.items():
        if got != wanted:
            return f"{name} is {got!r}, expected {wanted!r}"
    return (
        f"kind {kind}, dtype {dtype}, codec {codec}, boundary {rest[1]} or the manifest "
        "is not what is served here"
    )


@lru_cache(maxsize=MAX_ROWS)
def _table_struct(row_count: int) -> struct.Struct:
    return struct.Struct(">" + row_count * _ROW_FORMAT)


def pack_rows(rows: Rows) -> bytes:
    """Return the row table that leads a sealed body."""
    fields: list[bytes | int] = [0] * (4 * len(rows))
    fields[0::4], fields[1::4] = rows.sessions, rows.positions
    fields[2::4], fields[3::4] = rows.num_tokens, rows.flags
    return _table_struct(len(rows)).pack(*fields)


def _unpack_rows(table: memoryview, row_count: int) -> Rows:
    fields = _table_struct(row_count).unpack(table)
    return Rows(fields[0::4], fields[1::4], fields[2::4], fields[3::4])


def parse_body(peer: PeerId, lane: Lane, head: FrameHead, body: bytes) -> Frame:
    """Split a decrypted body into rows and payload.

    Raises:
        InvalidFrame: The row table and the payload do not add up.
    """
    table_bytes = head.row_count * ROW_BYTES
    view = memoryview(body)
    rows, payload = _unpack_rows(view[:table_bytes], head.row_count), view[table_bytes:]
    if head.row_count:
        check_rows(peer, head.shape, rows, len(payload))
    return Frame(lane, head.shape, rows, payload)


def check_rows(peer: PeerId, shape: FrameShape, rows: Rows, payload_bytes: int) -> None:
    """Raise `InvalidFrame` unless every row is possible and the payload is theirs exactly."""
    shortest, longest = min(rows.num_tokens), max(rows.num_tokens)
    if shortest < 1 or longest > MAX_ROW_TOKENS:
        wrong = shortest if shortest < 1 else longest
        raise InvalidFrame(peer=peer, problem=f"a row of {wrong} tokens")
    if max(rows.flags) > FLAG_LAST:
        raise InvalidFrame(peer=peer, problem=f"a row with the flags {max(rows.flags)}")
    if len(set(rows.sessions)) != len(rows):
        raise InvalidFrame(peer=peer, problem="two rows of one session")
    wanted = sum(rows.num_tokens) * shape.token_bytes
    if payload_bytes != wanted:
        raise InvalidFrame(
            peer=peer, problem=f"{payload_bytes} payload bytes, the rows need {wanted}"
        )
