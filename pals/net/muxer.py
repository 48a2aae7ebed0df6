"""The muxer over sockets: what libp2p asks of a muxed connection, around `pals.net.mux`.

Everything that can go out at once goes out in the task that caused it; one writer task
sends what could not. No task is ever half-way through a write: a record is sealed and
handed over without waiting, and what the socket does not take is the writer's.
"""

# pyright: reportMissingTypeStubs=false
# Reason: parts of libp2p ship no types.

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio
from libp2p.abc import IMuxedConn, IMuxedStream, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import (
    MuxedConnUnavailable,
    MuxedStreamClosed,
    MuxedStreamEOF,
    MuxedStreamReset,
)
from multiaddr import Multiaddr

from pals.net.mux import (
    MAX_PAYLOAD_BYTES,
    ConnectionEnded,
    Multiplexer,
    MuxLimits,
    StreamChanged,
    StreamOpened,
)
from pals.net.mux_stream import Message, ReceiveBudget, StreamState
from pals.net.noise import NoiseSession
from pals.net.noise_records import RecordError
from pals.net.pipe import PipeBroken
from pals.types import Buffer

MUX_PROTOCOL = "/pals/mux/1.0.0"
BATCH_BYTES = 128 << 10
"""What goes out between two looks at who sends next."""
READ_BYTES = 1 << 20


class MuxedStream(IMuxedStream):
    """One stream of a `MuxedConnection`.

    One task reads and any number write; writes do not mix. A cancelled read has taken
    nothing. A cancelled write has written all or nothing: what is left of a message that
    has begun is sent without the task that wrote it.
    """

    def __init__(self, connection: MuxedConnection, state: StreamState) -> None:
        self.muxed_conn = connection
        self._connection = connection
        self._mux = connection.mux
        self.state = state
        self._take: Callable[[bytes], None] | None = None
        self._readable = trio.lowlevel.ParkingLot()
        self._sent = trio.lowlevel.ParkingLot()

    async def read(self, n: int | None = None) -> bytes:
        """Return 1 to ``n`` bytes, or as many as there are.

        Raises:
            MuxedStreamEOF: The peer has closed its side.
            MuxedStreamReset: The stream was reset or the connection is gone.
        """
        if n == 0:
            return b""
        limit = n if n is not None and n > 0 else READ_BYTES
        await trio.lowlevel.checkpoint_if_cancelled()
        while not (data := self._mux.read(self.state, limit)):
            if self.state.problem:
                raise MuxedStreamReset(self.state.problem)
            if self.state.peer_closed:
                raise MuxedStreamEOF("the peer has closed it")
            await self._readable.park()
        if self._mux.has_news:
            self._connection.pump()
        return data

    def deliver_to(self, take: Callable[[bytes], None]) -> None:
        """Have ``take`` called with what comes from now on, by the task that receives it.

        What came before, and the end, are still for `read`.

        Args:
            take: Takes 1 or more bytes, and raises nothing.
        """
        self._take = take

    async def write(self, data: Buffer) -> None:
        """Return when all of ``data`` is sealed, which is when the socket takes it.

        Raises:
            MuxedStreamClosed: This side has closed the stream.
            MuxedStreamReset: The stream was reset, the peer took nothing of it in time, or
                the connection is gone.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_writable()
        if not len(data):
            return
        message = self._mux.queue(self.state, data, trio.current_time())
        self._connection.pump()
        if not message.is_sent:
            await self._wait_until_sent(message)
        if self.state.problem:
            raise MuxedStreamReset(self.state.problem)

    def try_write(self, data: Buffer) -> bool:
        """Write all of ``data``, at least a byte, if it can be sealed at once, else none of it.

        Raises:
            MuxedStreamClosed: This side has closed the stream.
            MuxedStreamReset: The stream was reset or the connection is gone.
        """
        self._check_writable()
        state = self.state
        fits = len(data) <= min(state.allowance, MAX_PAYLOAD_BYTES)
        if not fits or state.outbox or self._connection.secured_conn.has_unsent:
            return False
        now = trio.current_time()
        message = self._mux.queue(state, data, now)
        self._connection.pump(now)
        if state.problem:
            raise MuxedStreamReset(state.problem)
        if not message.sent:  # others came first; one frame holds it, so that none of it left
            self._mux.withdraw(state, message)
        return message.sent > 0

    def _check_writable(self) -> None:
        if self.state.problem:
            raise MuxedStreamReset(self.state.problem)
        if self.state.is_closing:
            raise MuxedStreamClosed("this side has closed it")

    async def _wait_until_sent(self, message: Message) -> None:
        message.is_awaited = True
        try:
            while not (message.is_sent or self.state.problem):
                await self._sent.park()
        finally:
            self._mux.withdraw(self.state, message)

    async def close(self) -> None:
        """Tell the peer that nothing more will be written."""
        self._mux.close(self.state, trio.current_time())
        self._connection.pump()

    async def reset(self) -> None:
        """End both directions at once."""
        self._mux.reset(self.state)
        self._connection.pump()

    def wake(self) -> bool:
        """Let whoever waits look at the stream again; return whether `deliver` is due."""
        state = self.state
        if self._sent:
            self._sent.unpark_all()
        if state.unread and self._take is not None:
            return True
        if self._readable and (state.unread or state.peer_closed or state.problem):
            self._readable.unpark_all()
        return False

    def deliver(self) -> None:
        """Give what has come to whoever takes it, and let a reader see the end."""
        assert self._take is not None
        while data := self._mux.read(self.state, READ_BYTES):
            self._take(data)
        self.wake()

    def set_deadline(self, ttl: int) -> None:
        raise ValueError("a deadline here is the cancel scope of whoever reads or writes")

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._connection.get_remote_address()

    async def __aenter__(self) -> MuxedStream:
        return self


class MuxedConnection(IMuxedConn):
    """One connection; `start` runs it until it ends.

    Args:
        conn: The secured connection, which nobody else uses from now on.
        peer_id: Who is at its other end.
        limits: What the connection spends on the peer.
        budget: The peer's unread bytes, shared by all its connections.
    """

    def __init__(
        self, conn: ISecureConn, peer_id: ID, *, limits: MuxLimits, budget: ReceiveBudget
    ) -> None:
        assert isinstance(conn, NoiseSession)
        self.secured_conn = conn
        self.peer_id = peer_id
        self.mux = Multiplexer(
            is_initiator=conn.is_initiator,
            limits=limits,
            budget=budget,
            now=trio.current_time(),
        )
        self.on_close: Callable[[], Awaitable[None]] | None = None
        self.event_started = trio.Event()
        self.event_closed = trio.Event()
        self._streams: dict[StreamState, MuxedStream] = {}
        self._due: list[MuxedStream] = []
        self._opened, self._inbox = trio.open_memory_channel[MuxedStream](
            limits.max_inbound_streams
        )
        self._writer = trio.lowlevel.ParkingLot()
        self._timer = trio.CancelScope()
        self._tasks = trio.CancelScope()

    # --- the tasks -------------------------------------------------------------------

    async def start(self) -> None:
        """Run the connection until it ends, then call ``on_close``."""
        self.event_started.set()
        try:
            with self._tasks:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._read)
                    nursery.start_soon(self._write)
                    nursery.start_soon(self._keep_time)
        finally:
            self.abort()
        if self.on_close is not None:
            await self.on_close()

    async def _read(self) -> None:
        try:
            while (opened := await self.secured_conn.receive()) is not None:
                now = trio.current_time()
                for plaintext in opened:
                    self.mux.receive(plaintext, now)
                self.pump(now)
                self._deliver()
            self.mux.lose("the peer closed the connection")
        except (PipeBroken, RecordError) as error:
            self.mux.lose(str(error))
        self._tell()

    async def _write(self) -> None:
        try:
            while True:
                while self.secured_conn.has_unsent:
                    await self.secured_conn.send_rest()
                self.pump()
                if self.mux.has_more:
                    await trio.lowlevel.checkpoint()
                elif not self.secured_conn.has_unsent:
                    await self._writer.park()
        except PipeBroken as error:
            self.mux.lose(str(error))
        self._tell()

    async def _keep_time(self) -> None:
        while True:
            with trio.CancelScope(deadline=self.mux.next_deadline()) as self._timer:
                await trio.sleep_forever()
            self.mux.tick(trio.current_time())
            self.pump()

    def pump(self, now: float | None = None) -> None:
        """Send what goes out at once, and tell what happened.

        Args:
            now: The time, where the caller has just asked for it.
        """
        if not self.secured_conn.has_unsent and not self.event_closed.is_set():
            now = trio.current_time() if now is None else now
            batch = self.mux.next_batch(BATCH_BYTES, now)
            try:
                if batch:
                    self.secured_conn.send_now(batch)
            except PipeBroken as error:
                self.mux.lose(str(error))
            if self.mux.has_more or self.secured_conn.has_unsent:
                self._writer.unpark_all()
        self._tell()

    def _tell(self) -> None:
        while events := self.mux.take_events():
            for event in events:
                match event:
                    case StreamChanged(state):
                        self._wake(state)
                    case StreamOpened(state):
                        self._offer(state)
                    case ConnectionEnded():
                        self._opened.close()
                        self._tasks.cancel()
        if self.mux.has_new_deadline:
            self._timer.deadline = min(self._timer.deadline, self.mux.next_deadline())

    def _wake(self, state: StreamState) -> None:
        stream = self._streams.get(state)
        if stream is not None:
            if stream.wake():
                self._due.append(stream)
            if state.is_forgotten:
                del self._streams[state]

    def _deliver(self) -> None:
        """Give the streams that have a taker what came; the reading task alone does it.

        So no taker is called out of what another one does, and the peer is read no further
        before all of them are done.
        """
        due, self._due = self._due, []
        for stream in due:
            stream.deliver()
        if due and self.mux.has_news:
            self.pump()

    def _offer(self, state: StreamState) -> None:
        stream = self._streams[state] = MuxedStream(self, state)
        try:
            self._opened.send_nowait(stream)
        except trio.WouldBlock:
            self.mux.reset(state, "nobody accepts it")
            self._writer.unpark_all()

    # --- what libp2p calls -----------------------------------------------------------

    async def open_stream(self) -> MuxedStream:
        """Open a stream.

        Raises:
            MuxedConnUnavailable: The connection has ended.
        """
        if self.mux.problem:
            raise MuxedConnUnavailable(self.mux.problem)
        state = self.mux.open(trio.current_time())
        stream = self._streams[state] = MuxedStream(self, state)
        self.pump()
        return stream

    async def accept_stream(self) -> MuxedStream:
        """Wait for a stream that the peer opens.

        Raises:
            MuxedConnUnavailable: The connection has ended.
        """
        try:
            stream = await self._inbox.receive()
        except trio.EndOfChannel as error:
            raise MuxedConnUnavailable(self.mux.problem) from error
        self.mux.accept(stream.state)
        self.pump()
        return stream

    async def close(self) -> None:
        """Say goodbye and close; nothing that is written later is sent."""
        self.mux.end("it was closed here")
        self.pump()
        self.abort()

    def abort(self) -> None:
        """Close the socket at once, and with it every stream."""
        self.mux.end("it was closed here")
        self._tell()
        self.secured_conn.abort()
        self.event_closed.set()

    @property
    def is_initiator(self) -> bool:
        return self.secured_conn.is_initiator

    @property
    def is_established(self) -> bool:
        return self.event_started.is_set() and not self.is_closed

    @property
    def is_closed(self) -> bool:
        return self.event_closed.is_set()

    def get_transport_addresses(self) -> list[Multiaddr]:
        return self.secured_conn.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        return self.secured_conn.get_connection_type()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self.secured_conn.get_remote_address()
