"""The list and the secret from member to member: two small request protocols.

``/pals/roster/1``: the request is this side's news behind a 4-byte length; the answer is
the other's news and then the entries after those that the request names, each behind a
2-byte length, and an empty one at the end. Both sides so learn who of them is behind.

``/pals/secret/1``: the request is an epoch (8 bytes); the answer a 2-byte length and the
secret of that epoch, sealed to the member that asks, or nothing.

Entries are verified and the secret is checked against its commitment by whoever asked, so
a member that lies can at most keep something to itself.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import trio

from pals.errors import InvalidRecord, PeerUnreachable
from pals.net.host import Host, Stream, StreamHandler
from pals.net.rates import RateLimit
from pals.swarm.news import MAX_NEWS_BYTES, News, decode_news, encode_news
from pals.swarm.records import MAX_ENTRY_BYTES
from pals.swarm.roster import MAX_ENTRIES
from pals.swarm.sealing import SEALED_BYTES
from pals.types import PeerId, short_id

_log = logging.getLogger(__name__)

ROSTER_PROTOCOL = "/pals/roster/1"
SECRET_PROTOCOL = "/pals/secret/1"  # noqa: S105 # the name of a protocol
ROSTER_DEADLINE_S = 20.0
SECRET_DEADLINE_S = 5.0
ANSWERS_AT_ONCE = 16
REQUESTS_PER_S = 2.0
REQUESTS_BURST = 20.0
_EPOCH = struct.Struct(">Q")

_T = TypeVar("_T")
_Read = Callable[[Stream], Awaitable[_T]]


class Source(Protocol):
    """What is exchanged; all calls are on the trio thread."""

    def news(self) -> News: ...

    def entries_after(self, seq: int) -> tuple[bytes, ...]: ...

    def on_request(self, peer: PeerId, news: News) -> None:
        """Learn where the list of a member ends that asks for this one's."""
        ...

    def sealed_secret(self, peer: PeerId, epoch: int) -> bytes:
        """Return the secret of ``epoch`` for a member, or nothing."""
        ...


class RosterExchange:
    """Asks members for entries and secrets, and answers when they ask.

    Args:
        host: The running host.
        source: What this machine holds.
    """

    def __init__(self, host: Host, source: Source) -> None:
        self._host = host
        self._source = source
        self._answers = trio.CapacityLimiter(ANSWERS_AT_ONCE)
        self._rate = RateLimit(per_s=REQUESTS_PER_S, burst=REQUESTS_BURST)
        host.handle(ROSTER_PROTOCOL, self._limited(self._answer_roster, ROSTER_DEADLINE_S))
        host.handle(SECRET_PROTOCOL, self._limited(self._answer_secret, SECRET_DEADLINE_S))

    async def ask_roster(self, peer: PeerId) -> tuple[News, tuple[bytes, ...]]:
        """Tell a member this machine's news; return its own, and the entries behind ours.

        Raises:
            PeerUnreachable: It cannot be asked, or does not answer whole in time.
            InvalidRecord: It answers something else.
        """
        return await ask_roster(self._host, peer, self._source.news())

    async def ask_secret(self, peer: PeerId, epoch: int) -> bytes:
        """Return what a member gives as the sealed secret of ``epoch``; empty for nothing.

        Raises:
            PeerUnreachable: It cannot be asked, or does not answer in time.
            InvalidRecord: It answers something else.
        """

        async def read(stream: Stream) -> bytes:
            await stream.write(_EPOCH.pack(epoch))
            return await _read_part(stream, SEALED_BYTES)

        return await _ask(self._host, peer, SECRET_PROTOCOL, read, SECRET_DEADLINE_S)

    def purge(self, now: float) -> None:
        """Forget who asked long ago."""
        self._rate.purge(now)

    # --- answering -------------------------------------------------------------------

    def _limited(self, answer: StreamHandler, deadline_s: float) -> StreamHandler:
        """Return a handler that no member can keep busy."""

        async def handle(stream: Stream) -> None:
            peer = stream.peer_id
            if not self._rate.allows(peer, trio.current_time()):
                raise PeerUnreachable(peer=peer, problem="it asks too often")
            async with self._answers:
                with trio.move_on_after(deadline_s) as scope:
                    await answer(stream)
            if scope.cancelled_caught:
                raise PeerUnreachable(peer=peer, problem="it did not read its answer in time")

        return handle

    async def _answer_roster(self, stream: Stream) -> None:
        size = int.from_bytes(await stream.read_exactly(4), "big")
        if size > MAX_NEWS_BYTES:
            raise InvalidRecord(kind="news", problem=f"{size} bytes")
        theirs = decode_news(await stream.read_exactly(size))
        # Before they are acted upon: what is asked for is the state that the request found.
        news, entries = self._source.news(), self._source.entries_after(theirs.seq)
        self._source.on_request(stream.peer_id, theirs)
        await _write_part(stream, encode_news(news))
        for entry in entries:
            await _write_part(stream, entry)
        await _write_part(stream, b"")

    async def _answer_secret(self, stream: Stream) -> None:
        (epoch,) = _EPOCH.unpack(await stream.read_exactly(_EPOCH.size))
        sealed = self._source.sealed_secret(stream.peer_id, epoch)
        _log.debug(
            "secret of epoch %d for %s: %d bytes", epoch, short_id(stream.peer_id), len(sealed)
        )
        await _write_part(stream, sealed)


# --- asking --------------------------------------------------------------------------


async def ask_roster(host: Host, peer: PeerId, own: News) -> tuple[News, tuple[bytes, ...]]:
    """Tell a member this machine's news; return its own, and the entries behind these.

    Raises:
        PeerUnreachable: It cannot be asked, or does not answer whole in time.
        InvalidRecord: It answers something else.
    """

    async def read(stream: Stream) -> tuple[News, tuple[bytes, ...]]:
        request = encode_news(own)
        await stream.write(len(request).to_bytes(4, "big") + request)
        news = decode_news(await _read_part(stream, MAX_NEWS_BYTES))
        entries: list[bytes] = []
        while entry := await _read_part(stream, MAX_ENTRY_BYTES):
            entries.append(entry)
            if len(entries) > MAX_ENTRIES:
                raise InvalidRecord(kind="list", problem=f"more than {MAX_ENTRIES} entries")
        return news, tuple(entries)

    return await _ask(host, peer, ROSTER_PROTOCOL, read, ROSTER_DEADLINE_S)


async def _ask(host: Host, peer: PeerId, protocol: str, read: _Read[_T], deadline_s: float) -> _T:
    with trio.move_on_after(deadline_s):
        stream = await host.open_stream(peer, protocol)
        try:
            return await read(stream)
        finally:
            with trio.move_on_after(1.0, shield=True):
                await stream.reset()
    raise PeerUnreachable(peer=peer, problem=f"no answer within {deadline_s:g} s")


async def _write_part(stream: Stream, part: bytes) -> None:
    await stream.write(len(part).to_bytes(2, "big") + part)


async def _read_part(stream: Stream, max_bytes: int) -> bytes:
    size = int.from_bytes(await stream.read_exactly(2), "big")
    if size > max_bytes:
        raise InvalidRecord(kind="answer", problem=f"a part of {size} bytes")
    return await stream.read_exactly(size)
