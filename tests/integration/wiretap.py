"""Records what every member of this process writes to the streams of its links, inside Noise.

Other streams carry what members tell each other of themselves, signed and not sealed.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pals.net.host import Host, Stream, StreamHandler
from pals.net.links import LANE_PROTOCOL, LINK_PROTOCOL, Links
from pals.net.muxer import MuxedStream
from pals.net.wire import HEADER_BYTES, Kind, Lane, Outgoing
from pals.swarm.keys import TAG_BYTES
from pals.types import PeerId

WRITES_BEFORE_FRAMES = {(LINK_PROTOCOL, True): 2, (LINK_PROTOCOL, False): 1}
"""Hello and confirmation, welcome; on another lane whoever opens it writes a preface."""


@dataclass(slots=True, kw_only=True, eq=False)
class StreamEnd:
    """One member's end of a stream, its number in its connection, and all that it wrote there."""

    local: PeerId
    remote: PeerId
    protocol: str
    is_opener: bool
    number: int
    writes: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class TappedStream:
    """Both directions of one stream."""

    protocol: str
    opener: PeerId
    acceptor: PeerId
    from_opener: bytes
    from_acceptor: bytes


@dataclass(frozen=True, slots=True)
class SentFrame:
    """A frame as a member handed it to its links: what it means to say."""

    sender: PeerId
    receiver: PeerId
    lane: Lane
    outgoing: Outgoing


Tamper = Callable[[StreamEnd, bytes], bytes]


class Wiretap:
    """One recorder for all nodes of the process; also the source of their ephemeral keys."""

    def __init__(self) -> None:
        self.ends: list[StreamEnd] = []
        self.sent: list[SentFrame] = []
        self.private_keys: dict[bytes, bytes] = {}
        self.tamper: Tamper = lambda _, data: data
        self._end_of: dict[Stream, StreamEnd] = {}
        self._not_written: dict[Stream, bytes] = {}

    def make_ephemeral(self) -> X25519PrivateKey:
        """Return the next of a fixed row of keys, and remember it."""
        seed = hashlib.sha256(b"ephemeral %d" % len(self.private_keys)).digest()
        key = X25519PrivateKey.from_private_bytes(seed)
        self.private_keys[key.public_key().public_bytes_raw()] = seed
        return key

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Tap all streams that are opened from now on, until ``patch`` is undone."""
        write, try_write, send = Stream.write, Stream.try_write, Links.send
        open_stream, handle = Host.open_stream, Host.handle

        async def tapped_write(stream: Stream, data: bytes | bytearray) -> None:
            end = self._end_of.get(stream)
            if end is not None:
                data = self._tampered(stream, end, data)
                end.writes.append(data)
            await write(stream, data)

        def tapped_try_write(stream: Stream, data: bytes | bytearray) -> bool:
            end = self._end_of.get(stream)
            if end is None:
                return try_write(stream, data)
            data = self._tampered(stream, end, data)
            is_written = try_write(stream, data)
            if is_written:
                end.writes.append(data)
            else:
                self._not_written[stream] = data
            return is_written

        async def tapped_open(host: Host, peer: PeerId, protocol: str, **options: float) -> Stream:
            stream = await open_stream(host, peer, protocol, **options)
            self._add(stream, host.peer_id, protocol, is_opener=True)
            return stream

        def tapped_handle(host: Host, protocol: str, handler: StreamHandler) -> None:
            async def tapped(stream: Stream) -> None:
                self._add(stream, host.peer_id, protocol, is_opener=False)
                await handler(stream)

            handle(host, protocol, tapped)

        def tapped_send(links: Links, peer: PeerId, lane: Lane, outgoing: Outgoing) -> None:
            send(links, peer, lane, outgoing)
            self.sent.append(SentFrame(links._host.peer_id, peer, lane, outgoing))

        patch.setattr(Stream, "write", tapped_write)
        patch.setattr(Stream, "try_write", tapped_try_write)
        patch.setattr(Host, "open_stream", tapped_open)
        patch.setattr(Host, "handle", tapped_handle)
        patch.setattr(Links, "send", tapped_send)

    def _tampered(self, stream: Stream, end: StreamEnd, data: bytes | bytearray) -> bytes:
        """Return what to write; what was not written at once is what is written next."""
        if stream in self._not_written:
            return self._not_written.pop(stream)
        return self.tamper(end, bytes(data))

    def all_sent_is_written(self) -> bool:
        """Return whether no frame waits in an outbox; what a link says itself is not counted."""
        written = sum(is_sent for end in self.ends for is_sent in _frames_of(end))
        return written == len(self.sent)

    def links_opened(self) -> list[StreamEnd]:
        return [e for e in self.ends if e.protocol == LINK_PROTOCOL and e.is_opener]

    def streams(self) -> list[TappedStream]:
        """Pair the ends: the n-th of a number that A opened to B is the n-th that B served."""
        sides: dict[bool, defaultdict[tuple[str, PeerId, PeerId, int], list[bytes]]]
        sides = {True: defaultdict(list), False: defaultdict(list)}
        for end in self.ends:
            peers = (end.local, end.remote) if end.is_opener else (end.remote, end.local)
            key = (end.protocol, *peers, end.number)
            sides[end.is_opener][key].append(b"".join(end.writes))
        assert sides[True].keys() == sides[False].keys()
        return [
            TappedStream(
                protocol=protocol,
                opener=opener,
                acceptor=acceptor,
                from_opener=from_opener,
                from_acceptor=from_acceptor,
            )
            for (protocol, opener, acceptor, number), opened in sides[True].items()
            for from_opener, from_acceptor in zip(
                opened, sides[False][protocol, opener, acceptor, number], strict=True
            )
        ]

    def _add(self, stream: Stream, local: PeerId, protocol: str, *, is_opener: bool) -> None:
        if protocol not in (LINK_PROTOCOL, LANE_PROTOCOL):
            return
        assert isinstance(stream._bytes, MuxedStream)
        end = StreamEnd(
            local=local,
            remote=stream.peer_id,
            protocol=protocol,
            is_opener=is_opener,
            number=stream._bytes.state.stream_id,
        )
        self._end_of[stream] = end
        self.ends.append(end)


def flip(data: bytes, bit: int) -> bytes:
    """Return ``data`` with one bit changed; bit 8 is the lowest of the second byte."""
    return (int.from_bytes(data, "little") ^ 1 << bit).to_bytes(len(data), "little")


def _frames_of(end: StreamEnd) -> Iterator[bool]:
    """Say of each frame that a member wrote whether it was given to its links to send."""
    skipped = WRITES_BEFORE_FRAMES.get((end.protocol, end.is_opener), int(end.is_opener))
    for data in end.writes[skipped:]:
        start = 0
        while start < len(data):
            body_end = start + HEADER_BYTES
            body_bytes = int.from_bytes(data[body_end - 4 : body_end], "big")
            yield data[start + 6] != Kind.KEY
            start = body_end + body_bytes + TAG_BYTES
