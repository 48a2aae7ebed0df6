"""One direction of one lane of a link, sans-IO: frames to bytes, and bytes to frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pals.net.handshake import LinkKeys
from pals.net.wire import (
    HEADER_BYTES,
    Frame,
    FrameHead,
    FrameShape,
    Lane,
    Outgoing,
    check_header,
    pack_header,
    pack_rows,
    parse_body,
)
from pals.swarm.keys import TAG_BYTES, frame_key


class LaneSender:
    """Seals the frames of one lane in one direction; the counter is the nonce."""

    def __init__(self, keys: LinkKeys, lane: Lane) -> None:
        self._lane = lane
        self.change_keys(keys)

    @property
    def counter(self) -> int:
        """Frames sealed under the current keys."""
        return self._key.counter

    def change_keys(self, keys: LinkKeys) -> None:
        """Seal the next frame as the first under other keys; the old key is dropped."""
        self._address = keys.address
        self._key = frame_key(keys.prk, keys.local, keys.remote, self._lane)

    def seal(self, outgoing: Outgoing) -> bytearray:
        """Return the lane's next frame; its payload is copied once, on its way here.

        Raises:
            FrameKeyExhausted: The current keys have sealed all they may.
        """
        body = b"".join((pack_rows(outgoing.rows), *outgoing.payload))
        header = pack_header(
            self._address,
            self._lane,
            self._key.counter,
            outgoing.shape,
            len(outgoing.rows),
            len(body),
        )
        return self._key.seal(header, body)


class LaneReceiver:
    """Opens the frames of one lane in one direction, from bytes cut anywhere.

    After the first `InvalidFrame` the lane is dead and the caller drops the link: there
    is no second try for whoever probes it.
    """

    def __init__(self, keys: LinkKeys, lane: Lane) -> None:
        self._lane = lane
        self._buffer = bytearray()
        self._head: FrameHead | None = None
        self.change_keys(keys)

    @property
    def counter(self) -> int:
        """Frames opened under the current keys."""
        return self._key.counter

    def change_keys(self, keys: LinkKeys) -> None:
        """Take the next frame for the first under other keys; the old key is dropped."""
        self._address = keys.address
        self._remote = keys.remote
        self._key = frame_key(keys.prk, keys.remote, keys.local, self._lane)

    def receive(self, data: bytes, accepted: Sequence[FrameShape]) -> Iterator[Frame]:
        """Add received bytes and give the frames that are now complete, one by one.

        Keys that are changed between two frames hold for the second.

        Args:
            data: Bytes of the lane's stream, in order.
            accepted: The shapes this process takes on this lane.

        Raises:
            InvalidFrame: A header is not the expected one, or a body does not open.
        """
        self._buffer += data
        while (frame := self._next_frame(accepted)) is not None:
            yield frame

    def _next_frame(self, accepted: Sequence[FrameShape]) -> Frame | None:
        if len(self._buffer) < HEADER_BYTES:
            return None
        if self._head is None:
            self._head = check_header(
                bytes(self._buffer[:HEADER_BYTES]),
                peer=self._remote,
                address=self._address,
                lane=self._lane,
                counter=self._key.counter,
                accepted=accepted,
            )
        end = HEADER_BYTES + self._head.body_bytes + TAG_BYTES
        if len(self._buffer) < end:
            return None
        return self._open(self._head, end)

    def _open(self, head: FrameHead, end: int) -> Frame:
        with memoryview(self._buffer) as view:
            header = bytes(view[:HEADER_BYTES])
            with view[HEADER_BYTES:end] as sealed:
                body = self._key.open(header, sealed)
        frame = parse_body(self._remote, self._lane, head, body)
        # Only now: a frame that was refused stays first, so that the lane stays dead.
        del self._buffer[:end]
        self._head = None
        return frame
