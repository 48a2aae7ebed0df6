"""Strict decoding of signed msgpack values."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from pals.errors import InvalidRecord

_T = TypeVar("_T")


def decode_strict(
    decoder: msgspec.msgpack.Decoder[_T], data: bytes, *, kind: str, max_bytes: int
) -> _T:
    """Decode ``data`` if it is the one canonical encoding of its value.

    Raises:
        InvalidRecord: Too long, malformed, or another encoding than ours of the value, by
            which one record could have several hashes.
    """
    if len(data) > max_bytes:
        raise InvalidRecord(kind=kind, problem=f"longer than {max_bytes} bytes")
    try:
        value = decoder.decode(data)
    # msgspec lets Python's own error through for a text that is not UTF-8.
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRecord(kind=kind, problem=str(error)) from error
    if msgspec.msgpack.encode(value) != data:
        raise InvalidRecord(kind=kind, problem="not in its canonical form")
    return value
