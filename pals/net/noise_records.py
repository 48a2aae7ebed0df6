"""The records of Noise after its handshake, sans-IO: bytes to seal in, bytes to send out.

Bytes of a record::

    length (2, big-endian) || ChaCha20-Poly1305(plaintext), 16 bytes longer than it

The nonce is four zero bytes and the record's number, 8 bytes little-endian; each
direction counts its own from 0.

Source: libp2p specs, noise/README.md; the Noise Protocol Framework, sections 5.1 and 12.3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from pals.types import Buffer

TAG_BYTES = 16
MAX_RECORD_BYTES = 65535
MAX_PLAINTEXT_BYTES = MAX_RECORD_BYTES - TAG_BYTES
OWN_RECORD_BYTES = 16 << 10
"""A piece of this size gets records of its own; smaller ones share records."""
RECEIVE_BYTES = 1 << 18
_LENGTH = struct.Struct(">H")
_NONCE = struct.Struct("<4xQ")


class RecordError(Exception):
    """A record does not open: it was changed, left out, repeated or moved."""


class RecordSealer:
    """Makes the records of one direction.

    Args:
        key: 32 bytes.
        number: Records sent with this key before.
    """

    def __init__(self, key: bytes, number: int = 0) -> None:
        self._cipher = ChaCha20Poly1305(key)
        self._number = number

    def seal(self, pieces: Iterable[Buffer]) -> list[bytes]:
        """Return what to send, in order, for the bytes of ``pieces`` one after another."""
        sealed: list[bytes] = []
        small: list[Buffer] = []
        size = 0
        for piece in pieces:
            if len(piece) >= OWN_RECORD_BYTES or size + len(piece) > MAX_PLAINTEXT_BYTES:
                self._seal_small(small, sealed)
                small, size = [], 0
            if len(piece) >= OWN_RECORD_BYTES:
                self._seal_large(piece, sealed)
            else:
                small.append(piece)
                size += len(piece)
        self._seal_small(small, sealed)
        return sealed

    def _seal_small(self, pieces: Sequence[Buffer], sealed: list[bytes]) -> None:
        joined = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if joined:
            record = self._cipher.encrypt(_NONCE.pack(self._number), joined, None)
            self._number += 1
            sealed.append(_LENGTH.pack(len(record)) + record)

    def _seal_large(self, piece: Buffer, sealed: list[bytes]) -> None:
        view = memoryview(piece)
        for start in range(0, len(view), MAX_PLAINTEXT_BYTES):
            part = view[start : start + MAX_PLAINTEXT_BYTES]
            record = self._cipher.encrypt(_NONCE.pack(self._number), part, None)
            self._number += 1
            sealed += (_LENGTH.pack(len(record)), record)


class RecordOpener:
    """Opens the records of one direction, however the bytes of them arrive.

    Put received bytes at the start of `space`, and say with `received` how many; what is
    opened is never copied.

    Args:
        key: 32 bytes.
        number: Records received with this key before.
    """

    def __init__(self, key: bytes, number: int = 0) -> None:
        self._cipher = ChaCha20Poly1305(key)
        self._number = number
        self._held = memoryview(bytearray(RECEIVE_BYTES))
        self._end = 0

    @property
    def space(self) -> memoryview:
        """Where received bytes go; never empty, since a whole record is taken out at once."""
        return self._held[self._end :]

    def received(self, count: int) -> Sequence[bytes]:
        """Return the plaintexts of the records that ``count`` more bytes complete.

        Raises:
            RecordError: A record does not open; no later one will.
        """
        held, self._end = self._held, self._end + count
        start, end = 0, self._end
        opened: list[bytes] = []
        while end - start >= _LENGTH.size:
            body = start + _LENGTH.size
            stop = body + _LENGTH.unpack_from(held, start)[0]
            if stop > end:
                break
            opened.append(self._open(held[body:stop]))
            start = stop
        if start:
            held[: end - start] = held[start:end]
            self._end = end - start
        return opened

    def _open(self, record: memoryview) -> bytes:
        try:
            opened = self._cipher.decrypt(_NONCE.pack(self._number), record, None)
        except InvalidTag as error:
            raise RecordError(f"record {self._number} does not open") from error
        self._number += 1
        return opened
