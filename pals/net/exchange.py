"""The table request: ask any member for the records that this machine lacks.

A request is a 4-byte length and a msgpack map from peer id to the number of the record
held; the answer is the newer records, each behind a 2-byte length, and an empty one at
the end. A record that the answer brings counts for what it proves by itself, so a member
that lies can only leave some out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Protocol

import msgspec
import trio
from msgspec import Meta

from pals.errors import InvalidRecord, PalsError, PeerUnreachable
from pals.net.announce import MAX_RECORD_BYTES, MAX_SEQ
from pals.net.host import Host, Stream
from pals.net.table import MAX_PEERS
from pals.types import PeerId, short_id

_log = logging.getLogger(__name__)

PROTOCOL = "/pals/table/1"
MAX_REQUEST_BYTES = 64 << 10
REQUEST_DEADLINE_S = 5.0
ANSWERS_AT_ONCE = 16

_Peer = Annotated[str, Meta(max_length=64)]
_Known = Annotated[dict[_Peer, Annotated[int, Meta(ge=0, le=MAX_SEQ)]], Meta(max_length=MAX_PEERS)]
_decoder = msgspec.msgpack.Decoder(_Known)


class Records(Protocol):
    """The table whose records are exchanged."""

    def known(self) -> Mapping[PeerId, int]: ...

    def newer_than(self, known: Mapping[str, int]) -> list[bytes]: ...

    def offer(self, record: bytes) -> None:
        """Take a record, which may be of no use or not even valid."""
        ...


class TableExchange:
    """Asks members for records, and answers when they ask.

    Args:
        host: The running host.
        records: What is exchanged.
    """

    def __init__(self, host: Host, records: Records) -> None:
        self._host = host
        self._records = records
        self._answering: set[PeerId] = set()
        self._answers = trio.CapacityLimiter(ANSWERS_AT_ONCE)
        host.handle(PROTOCOL, self._answer)

    async def ask(self, peer: PeerId) -> bool:
        """Ask one member and offer what it sends; return whether it answered whole."""
        with trio.move_on_after(REQUEST_DEADLINE_S):
            try:
                stream = await self._host.open_stream(peer, PROTOCOL)
                try:
                    await self._read_answer(stream)
                finally:
                    with trio.CancelScope(shield=True):
                        await stream.reset()
            except PalsError as error:
                _log.info("no table of peer %s: %s", short_id(peer), error)
            else:
                return True
        return False

    async def _read_answer(self, stream: Stream) -> None:
        request = msgspec.msgpack.encode(self._records.known())
        await stream.write(len(request).to_bytes(4, "big") + request)
        for _ in range(MAX_PEERS + 1):
            size = int.from_bytes(await stream.read_exactly(2), "big")
            if size == 0:
                return
            if size > MAX_RECORD_BYTES:
                raise PeerUnreachable(peer=stream.peer_id, problem=f"a record of {size} bytes")
            self._records.offer(await stream.read_exactly(size))
        raise PeerUnreachable(peer=stream.peer_id, problem=f"more than {MAX_PEERS} records")

    async def _answer(self, stream: Stream) -> None:
        """Serve one request; a peer that asks again before the answer is refused."""
        peer = stream.peer_id
        if peer in self._answering:
            raise PeerUnreachable(peer=peer, problem="it asks for several tables at once")
        self._answering.add(peer)
        try:
            async with self._answers:
                with trio.move_on_after(REQUEST_DEADLINE_S) as scope:
                    await self._send_newer(stream)
                if scope.cancelled_caught:
                    raise PeerUnreachable(peer=peer, problem="it did not read its table")
        finally:
            self._answering.discard(peer)

    async def _send_newer(self, stream: Stream) -> None:
        size = int.from_bytes(await stream.read_exactly(4), "big")
        if size > MAX_REQUEST_BYTES:
            raise InvalidRecord(kind="table request", problem=f"{size} bytes")
        try:
            known = _decoder.decode(await stream.read_exactly(size))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRecord(kind="table request", problem=str(error)) from error
        for record in self._records.newer_than(known):
            await stream.write(len(record).to_bytes(2, "big") + record)
        await stream.write(bytes(2))
