"""Finding members on the local network, when asked: multicast DNS.

A member says there that it belongs to a swarm and where it listens. Whoever hears it learns
addresses and nothing to rely on: only members are dialled, and whoever answers must prove
the peer id. The swarm is told by a tag, from which nobody gets its id.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import trio
from zeroconf import Error as ZeroconfError
from zeroconf import ServiceBrowser, ServiceInfo, ServiceListener, Zeroconf

from pals.types import PeerId, SwarmId

_log = logging.getLogger(__name__)

SERVICE = "_pals._tcp.local."
MAX_WAITING = 64
MAX_ADDRESSES = 8
RESOLVE_MS = 3000
RESTART_S = 60.0
TAG_CHARS = 16
MAX_PEER_CHARS = 64
_FAULTS = (OSError, ZeroconfError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbour:
    """What somebody on the local network says about a member.

    Attributes:
        peer: The member.
        addresses: Multiaddrs at which it is said to listen.
    """

    peer: PeerId
    addresses: tuple[str, ...]


class LocalNetwork:
    """Tells the local network of this member, and hears of others.

    Args:
        swarm_id: Only members of this swarm are heard.
        peer: This member.
        addresses: Returns the multiaddrs at which it listens, as others see them.
        changed: Waits until these are others.
        on_heard: Called with each neighbour that is heard of.
    """

    def __init__(
        self,
        swarm_id: SwarmId,
        peer: PeerId,
        addresses: Callable[[], Sequence[str]],
        changed: Callable[[], Awaitable[object]],
        on_heard: Callable[[Neighbour], Awaitable[None]],
    ) -> None:
        self._tag = swarm_tag(swarm_id)
        self._peer = peer
        self._addresses = addresses
        self._changed = changed
        self._on_heard = on_heard

    async def run(self) -> None:
        """Take part until cancelled; a network without multicast is tried again."""
        while True:
            try:
                await self._run_once()
            except _FAULTS as error:
                _log.warning("nothing of the local network: %s", error or type(error).__name__)
            await trio.sleep(RESTART_S)

    async def _run_once(self) -> None:
        send, receive = trio.open_memory_channel[Neighbour](MAX_WAITING)
        zeroconf = await trio.to_thread.run_sync(Zeroconf)
        try:
            await trio.to_thread.run_sync(zeroconf.register_service, self._describe())
            listener = _Listener(self._tag, self._peer, send, trio.lowlevel.current_trio_token())
            await trio.to_thread.run_sync(ServiceBrowser, zeroconf, SERVICE, listener)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._follow_addresses, zeroconf)
                async for neighbour in receive:
                    nursery.start_soon(self._on_heard, neighbour)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(zeroconf.close)

    async def _follow_addresses(self, zeroconf: Zeroconf) -> None:
        while True:
            await self._changed()
            await trio.to_thread.run_sync(zeroconf.update_service, self._describe())

    def _describe(self) -> ServiceInfo:
        return describe(self._tag, self._peer, self._addresses())


class _Listener(ServiceListener):
    """Called on zeroconf's own thread; passes on what may be a member of the swarm."""

    def __init__(
        self,
        tag: str,
        own: PeerId,
        send: trio.MemorySendChannel[Neighbour],
        token: trio.lowlevel.TrioToken,
    ) -> None:
        self._tag = tag
        self._own = own
        self._send = send
        self._token = token

    def add_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        """Read what a new service says of itself."""
        info = zc.get_service_info(type_, name, timeout=RESOLVE_MS)
        neighbour = None if info is None else read(info, self._tag)
        if neighbour is None or neighbour.peer == self._own:
            return
        try:
            self._token.run_sync_soon(self._pass_on, neighbour)
        except trio.RunFinishedError:
            return

    def update_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        """Read what a service says of itself now."""
        self.add_service(zc, type_, name)

    def remove_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        """Do nothing: who is gone is found out otherwise."""

    def _pass_on(self, neighbour: Neighbour) -> None:
        try:
            self._send.send_nowait(neighbour)
        except (trio.WouldBlock, trio.BrokenResourceError):
            _log.debug("too many neighbours at once")


def swarm_tag(swarm_id: SwarmId) -> str:
    """Return how members of a swarm recognise each other, which tells others nothing."""
    return hashlib.sha256(b"pals/1 mdns\x00" + swarm_id).hexdigest()[:TAG_CHARS]


def describe(tag: str, peer: PeerId, addresses: Sequence[str]) -> ServiceInfo:
    """Return the service that stands for a member of the swarm ``tag``."""
    kept = addresses[:MAX_ADDRESSES]
    properties: dict[str, str | bytes | None] = {"swarm": tag, "peer": peer}
    properties |= {f"a{n}": address for n, address in enumerate(kept)}
    parts = [address.split("/") for address in kept]
    return ServiceInfo(
        SERVICE,
        f"{peer}.{SERVICE}",
        port=int(parts[0][4]) if parts else 0,
        properties=properties,
        server=f"{peer}.local.",
        # Without any, a service is never whole to those that hear it.
        parsed_addresses=[part[2] for part in parts if part[1] in ("ip4", "ip6")] or ["127.0.0.1"],
    )


def read(info: ServiceInfo, tag: str) -> Neighbour | None:
    """Return what a service says, or ``None`` when it is of no use to the swarm ``tag``."""
    said: dict[str, str] = {}
    for key, value in info.properties.items():
        try:
            said[key.decode()] = (value or b"").decode()
        except UnicodeDecodeError:
            return None
    addresses = tuple(said[key] for key in (f"a{n}" for n in range(MAX_ADDRESSES)) if key in said)
    peer = said.get("peer", "")
    if said.get("swarm") != tag or not 0 < len(peer) <= MAX_PEER_CHARS or not addresses:
        return None
    return Neighbour(peer=PeerId(peer), addresses=addresses)
