"""py-libp2p's own yamux, for members that do not run Pals, with its faults bounded.

- It neither counts nor limits what it holds unread (B8); here the peer is closed out.
- It gives up a write after 5 s without a window (B7); here it is not asked to write then.
- A connection without streams stays for ever; here it is closed.
"""

# pyright: reportMissingTypeStubs=false
# Reason: parts of libp2p ship no types.

from __future__ import annotations

from collections.abc import Callable

import trio
from libp2p.abc import IMuxedConn, ISecureConn
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError, MuxedStreamReset
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import Yamux, YamuxStream

from pals.net.noise import NoiseSession
from pals.types import Buffer

WINDOW_POLL_S = 0.01
"""It announces no window by an event; stock polls as often."""


class BoundedYamux(Yamux):
    """A connection that ends when its peer makes us hold too much, or nobody uses it.

    Args:
        conn: The secured connection.
        peer_id: Who is at its other end.
        max_unread_bytes: What the peer may have sent unread.
        idle_s: Seconds without a stream after which the connection is closed.
    """

    def __init__(
        self, conn: ISecureConn, peer_id: ID, *, max_unread_bytes: int, idle_s: float
    ) -> None:
        super().__init__(conn, peer_id, is_initiator=conn.is_initiator)
        self._max_unread_bytes = max_unread_bytes
        self._idle_s = idle_s

    async def start(self) -> None:
        """Run the connection until it ends."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._close_when_idle)
            await super().start()
            nursery.cancel_scope.cancel()

    async def _read_data_body(self, length: int) -> bytes:
        unread = sum(map(len, self.stream_buffers.values()))
        if unread + length > self._max_unread_bytes:
            raise trio.TooSlowError  # the one error of a body after which stock closes
        return await super()._read_data_body(length)

    async def _close_when_idle(self) -> None:
        used_at = trio.current_time()
        while trio.current_time() < used_at + self._idle_s:
            await trio.sleep(self._idle_s / 4)
            if self.streams:
                used_at = trio.current_time()
        await self.close()


class Muxers(MuxerMultistream):
    """Negotiates a muxer; stock would build its own yamux whatever was registered."""

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        protocol, muxer = await self._selector.select(
            conn, conn.is_initiator, self.negotiate_timeout
        )
        return self._annotate_connection(muxer(conn, peer_id), conn, protocol)


class YamuxBytes:
    """One stream of a `BoundedYamux`, with the errors and deadlines of our own streams.

    Args:
        stream: The stream as libp2p has it.
        write_s: Seconds in which the peer must take what is written at once; then its
            connection is closed, since half a message is on the wire.
    """

    def __init__(self, stream: NetStream, *, write_s: float) -> None:
        assert isinstance(stream.muxed_stream, YamuxStream)
        self._stream = stream
        self._muxed = stream.muxed_stream
        self._write_s = write_s
        self._write_lock = trio.Lock()

    async def read(self, n: int) -> bytes:
        """Return 1 to ``n`` bytes.

        Raises:
            MuxedStreamEOF: The peer has closed its side.
            MuxedStreamReset: The stream was reset or the connection is gone.
        """
        try:
            return await self._stream.read(n)
        except StreamEOF as error:
            if self._muxed.conn.event_shutting_down.is_set() or self._muxed.reset_received:
                raise MuxedStreamReset("the stream was cut") from error
            raise MuxedStreamEOF("the peer has closed it") from error
        except ValueError as error:
            raise MuxedStreamReset("the stream was reset") from error

    async def write(self, data: Buffer) -> None:
        """Write all of ``data``, shielded from cancellation.

        Raises:
            MuxedStreamError: The stream is closed or reset, or the peer was too slow.
        """
        async with self._write_lock:
            with trio.move_on_after(self._write_s, shield=True) as scope:
                await self._write_in_windows(memoryview(data))
            if scope.cancelled_caught:
                assert isinstance(self._muxed.conn.secured_conn, NoiseSession)
                self._muxed.conn.secured_conn.abort()
                raise MuxedStreamError(f"the peer took no bytes for {self._write_s} s")

    def try_write(self, data: Buffer) -> bool:
        """Return that nothing was written: stock writes in tasks only."""
        return False

    def deliver_to(self, take: Callable[[bytes], None]) -> None:
        """Do nothing: all that comes is there to `read`."""

    async def _write_in_windows(self, data: memoryview) -> None:
        while data:
            while not self._muxed.send_window:
                if self._muxed.closed or self._muxed.send_closed:
                    raise MuxedStreamError("the stream is closed")
                await trio.sleep(WINDOW_POLL_S)
            part = data[: self._muxed.send_window]
            await self._stream.write(bytes(part))
            data = data[len(part) :]
