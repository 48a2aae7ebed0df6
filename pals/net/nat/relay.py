"""Relaying: a member that both know carries their bytes, when nothing else connects them.

Each of the three has to want it: the relay (`--allow-relay`) and both ends
(`--use-relay`). The ends run Noise and the muxer through the circuit as on a socket, so
the relay sees who, when and how many bytes, and can change nothing unnoticed.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import trio

from pals.errors import PeerUnreachable, RelayRefused
from pals.net.host import Host, Stream
from pals.net.nat.conversation import end_stream, read_expected, send_message
from pals.net.nat.limits import Circuit, CircuitBook, RelayLimits
from pals.net.nat.messages import (
    MAX_PROBLEM_CHARS,
    RELAY_PROTOCOL,
    RELAYED_PROTOCOL,
    Refused,
    Relay,
    Relayed,
    Taken,
)
from pals.net.raw import RelayedStream, relayed_connection
from pals.types import PeerId, short_id

_log = logging.getLogger(__name__)

COPY_BYTES = 1 << 16


class RelayService:
    """Carries circuits between members, within limits.

    Args:
        host: This member.
        allowed: Whether this machine's user lets it; every request is refused otherwise.
        limits: What it spends on them.
    """

    def __init__(self, host: Host, *, allowed: bool, limits: RelayLimits) -> None:
        self._host = host
        self.allowed = allowed
        self._limits = limits
        self.book = CircuitBook(limits)

    def start(self) -> None:
        self._host.handle(RELAY_PROTOCOL, self._serve)

    async def _serve(self, source: Stream) -> None:
        """Carry one circuit from its request to its end."""
        request = await read_expected(source, Relay)
        try:
            async with self._open(source, PeerId(request.target)) as (circuit, target):
                await send_message(source, Taken())
                await self._carry(circuit, source, target)
        except (RelayRefused, PeerUnreachable) as error:
            await send_message(source, Refused(str(error.fields["problem"])[:MAX_PROBLEM_CHARS]))

    @asynccontextmanager
    async def _open(self, source: Stream, peer: PeerId) -> AsyncGenerator[tuple[Circuit, Stream]]:
        """Count a circuit and reach its far end.

        Raises:
            RelayRefused: A limit is reached, or the far end does not take it.
            PeerUnreachable: The far end is not directly connected.
        """
        relay = self._host.peer_id
        if not self.allowed:
            problem = "it was started without `--allow-relay`"
            raise RelayRefused(relay=relay, peer=peer, problem=problem)
        for end in (source.peer_id, peer):
            path = self._host.path(end) if self._host.is_member(end) else None
            if path is None or path.kind == "relayed":
                problem = f"peer {short_id(end)} is not directly connected to it"
                raise RelayRefused(relay=relay, peer=peer, problem=problem)
        circuit = self.book.open(source.peer_id, peer, relay=relay, now_s=trio.current_time())
        try:
            target = await self._host.open_stream(peer, RELAYED_PROTOCOL, connected_only=True)
            try:
                await send_message(target, Relayed(source=source.peer_id))
                await _expect_taken(target, relay=relay, peer=peer)
                yield circuit, target
            finally:
                await end_stream(target)
        finally:
            self.book.close(circuit)

    async def _carry(self, circuit: Circuit, source: Stream, target: Stream) -> None:
        """Copy bytes both ways until an end closes, or the circuit is idle or old."""
        with trio.move_on_after(self._limits.circuit_s):
            async with trio.open_nursery() as nursery:

                async def copy(sender: Stream, receiver: Stream) -> None:
                    await self._copy(circuit, sender, receiver)
                    nursery.cancel_scope.cancel()

                nursery.start_soon(copy, source, target)
                nursery.start_soon(copy, target, source)
                await self._until_idle(circuit)
                nursery.cancel_scope.cancel()
        _log.info(
            "circuit of %s with %s ended after %d bytes",
            short_id(circuit.source),
            short_id(circuit.target),
            circuit.carried_bytes,
        )
        # Half of what was sent may have been copied: neither end may take it for all.
        await end_stream(source)

    async def _until_idle(self, circuit: Circuit) -> None:
        idle_s = 0.0
        while idle_s < self._limits.idle_s:
            await trio.sleep(self._limits.idle_s - idle_s)
            idle_s = trio.current_time() - circuit.last_byte_s

    async def _copy(self, circuit: Circuit, sender: Stream, receiver: Stream) -> None:
        try:
            while data := await sender.read_some(COPY_BYTES):
                now_s = trio.current_time()
                await trio.sleep(self.book.charge(circuit, sender.peer_id, len(data), now_s))
                await receiver.write(data)
        except PeerUnreachable as error:
            _log.debug("a circuit ends: %s", error)


class RelayUser:
    """The ends of circuits: dials through relays, and takes what comes through them.

    Args:
        host: This member.
        wanted: Whether this machine's user wants any; what others open is refused otherwise.
        nursery: Where the circuits that it opened are kept.
    """

    def __init__(self, host: Host, *, wanted: bool, nursery: trio.Nursery) -> None:
        self._host = host
        self.wanted = wanted
        self._nursery = nursery

    def start(self) -> None:
        self._host.handle(RELAYED_PROTOCOL, self._serve)

    async def connect(self, peer: PeerId, relay: PeerId) -> None:
        """Connect to a member through another that both are connected to.

        Raises:
            RelayRefused: The relay does not carry it, or the peer does not take it.
            PeerUnreachable: The relay is gone, or the peer did not prove who it is.
        """
        stream = await self._host.open_stream(relay, RELAY_PROTOCOL, connected_only=True)
        circuit = RelayedStream(stream)
        try:
            await send_message(stream, Relay(target=peer))
            await _expect_taken(stream, relay=relay, peer=peer)
            raw = relayed_connection(circuit, initiator=True)
            await self._host.secure_outbound(raw, peer)
        except BaseException:
            await end_stream(stream)
            raise
        self._nursery.start_soon(self._keep, circuit, stream)

    async def _keep(self, circuit: RelayedStream, stream: Stream) -> None:
        try:
            await circuit.ended.wait()
        finally:
            await end_stream(stream)

    async def _serve(self, stream: Stream) -> None:
        """Take a circuit; the host's gate checks who is at its other end."""
        message = await read_expected(stream, Relayed)
        if not self.wanted:
            await send_message(stream, Refused("the peer was started without `--use-relay`"))
            return
        if not self._host.is_member(PeerId(message.source)):
            await send_message(stream, Refused("the caller is not a member"))
            return
        await send_message(stream, Taken())
        raw = relayed_connection(RelayedStream(stream), initiator=False)
        try:
            await self._host.serve_inbound(raw, f"/p2p/{stream.peer_id}/p2p-circuit")
        finally:
            await end_stream(stream)


async def _expect_taken(stream: Stream, *, relay: PeerId, peer: PeerId) -> None:
    """Raise unless the far end of ``stream`` takes the circuit."""
    try:
        await read_expected(stream, Taken)
    except PeerUnreachable as error:
        problem = error.fields["problem"]
        raise RelayRefused(relay=relay, peer=peer, problem=problem) from error
