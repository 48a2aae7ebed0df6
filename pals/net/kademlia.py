"""The swarm's own Kademlia network, which holds one announcement per peer.

The key is ``/pals/<peer id>``, the value a record of `pals.net.announce`, verified when
it is stored and again when it is read. What is here beside py-libp2p 0.8.1's KadDHT
works round it: its protocol id ignores every prefix, a read returns the local copy without
asking anybody, it does not know the peers that are connected, and one silent peer costs
each operation 10 s. So KadDHT keeps the routing table and serves queries, and the
look-ups are our own.
"""

# pyright: reportMissingTypeStubs=false, reportPrivateUsage=false
# Reason: parts of libp2p ship no types, and it queries one peer only privately.

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from types import ModuleType

import trio
from libp2p.custom_types import TProtocol
from libp2p.kad_dht import common, kad_dht, peer_routing, provider_store, value_store
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.utils import sort_peer_ids_by_distance
from libp2p.peer.id import ID
from libp2p.records.validator import NamespacedValidator, Validator
from libp2p.tools.anyio_service import background_trio_service

from pals.errors import InvalidRecord
from pals.net.announce import Announcement, newest
from pals.net.host import Host
from pals.types import PeerId, SwarmId, short_id

NAMESPACE = "pals"
LOOKUPS_AT_ONCE = 16
ANNOUNCE_DEADLINE_S = 10.0
QUERY_DEADLINE_S = 3.0
QUERIES_AT_ONCE = 10
REPLICAS = 20
SILENCE_S = 30.0
INBOUND_QUERIES = 64
FOLLOW_INTERVAL_S = 1.0

_MODULES: tuple[ModuleType, ...] = (common, kad_dht, peer_routing, provider_store, value_store)


OpenRecord = Callable[[bytes], Announcement]
"""Verifies a record and returns what it says, or raises `InvalidRecord`."""


class Kademlia:
    """Stores this machine's announcement, and finds those of other members.

    Args:
        host: The running host; its gate keeps strangers off the DHT too.
        swarm_id: Names the private protocol.
        open_record: Verifies a record; called for each that members offer.
    """

    def __init__(self, host: Host, swarm_id: SwarmId, open_record: OpenRecord) -> None:
        self._host = host
        self._swarm_id = swarm_id
        self._open = open_record
        self._running: KadDHT | None = None
        self._lookups = trio.CapacityLimiter(LOOKUPS_AT_ONCE)
        self._silent_until: dict[ID, float] = {}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take part in the DHT until cancelled; the other methods need this running."""
        validator = _AnnouncementValidator(self._open)
        with _private_protocol(self._swarm_id):
            self._running = dht = _make_dht(self._host, validator)
            self._host.on_disconnect(self._forget)
            async with background_trio_service(dht):
                task_status.started()
                while True:
                    await self.learn_connected()
                    await trio.sleep(FOLLOW_INTERVAL_S)

    async def put(self, record: bytes) -> None:
        """Store this machine's signed record at the members closest to its key.

        It stays until it expires, so put the next one well before that.

        Raises:
            InvalidRecord: The record does not verify, or is older than one stored before.
        """
        peer = self._open(record).peer
        if not self._keep(peer, record):
            raise InvalidRecord(kind="announcement", problem="older than the one announced before")
        key = _key(peer).encode()
        with trio.move_on_after(ANNOUNCE_DEADLINE_S):
            closest = await self._walk(key, lambda _: None)
            async with trio.open_nursery() as nursery:
                for target in closest[:REPLICAS]:
                    nursery.start_soon(self._store_at, target, key, record)

    async def find(
        self, peers: Iterable[PeerId], *, deadline_s: float
    ) -> dict[PeerId, Announcement]:
        """Return what those of ``peers`` that announce anything announce now.

        Never raises because of what peers say or fail to say: those that are silent are
        left out, and what was found by ``deadline_s`` seconds is returned.
        """
        wanted = frozenset(peers)

        async def look_up(peer: PeerId) -> None:
            async with self._lookups:
                await self._walk(_key(peer).encode(), lambda value: self._keep(peer, value))

        with trio.move_on_after(deadline_s):
            async with trio.open_nursery() as nursery:
                for peer in wanted:
                    nursery.start_soon(look_up, peer)
        held = ((peer, self._held(peer)) for peer in wanted)
        return {peer: announcement for peer, announcement in held if announcement is not None}

    def _held(self, peer: PeerId) -> Announcement | None:
        """Return the valid announcement of ``peer`` in this machine's own store, if any."""
        stored = self._dht.value_store.get(_key(peer).encode())
        return self._open_of(peer, stored.value) if stored is not None else None

    def _open_of(self, peer: PeerId, record: bytes) -> Announcement | None:
        try:
            announcement = self._open(record)
        except InvalidRecord:
            return None
        return announcement if announcement.peer == peer else None

    def _keep(self, peer: PeerId, record: bytes) -> bool:
        """Store a record unless it is invalid or older than the one held."""
        offered, held = self._open_of(peer, record), self._held(peer)
        if offered is None or (held is not None and newest([offered, held]) != 0):
            return False
        self._dht.value_store.put(_key(peer).encode(), record)
        return True

    # --- the network -----------------------------------------------------------------

    async def _walk(self, key: bytes, on_value: Callable[[bytes], object]) -> list[ID]:
        """Ask the members closest to ``key`` for its value, and those whom they name.

        KadDHT's own look-up waits for silent peers anew each time; this one gives
        ``on_value`` each value when it comes, and passes over who was silent lately.

        Returns:
            Those that answered, closest to ``key`` first.
        """
        known = {*self._dht.routing_table.find_local_closest_peers(key, REPLICAS)}
        known |= {ID.from_base58(peer) for peer in self._host.connected_peers()}
        asked: set[ID] = set()
        answered: list[ID] = []

        async def ask(peer: ID) -> None:
            answer = await self._query(peer, key)
            if answer is not None:
                answered.append(peer)
                known.update(answer[1])
                if answer[0] is not None:
                    on_value(answer[0])

        while batch := self._closest(known, key, asked):
            asked.update(batch)
            async with trio.open_nursery() as nursery:
                for peer in batch:
                    nursery.start_soon(ask, peer)
        return sort_peer_ids_by_distance(key, answered)

    def _closest(self, known: set[ID], key: bytes, asked: set[ID]) -> list[ID]:
        """Return whom to ask next: a few of the ``REPLICAS`` closest members known."""
        now = trio.current_time()
        usable = [
            peer
            for peer in known
            if peer != self._dht.local_peer_id
            and self._silent_until.get(peer, now) <= now
            and self._host.is_member(PeerId(peer.to_base58()))
        ]
        closest = sort_peer_ids_by_distance(key, usable)[:REPLICAS]
        return [peer for peer in closest if peer not in asked][:QUERIES_AT_ONCE]

    async def _query(self, peer: ID, key: bytes) -> tuple[bytes | None, list[ID]] | None:
        """Return what ``peer`` holds under ``key`` and whom it names, or ``None``."""
        with trio.move_on_after(QUERY_DEADLINE_S):
            answer = await self._dht.value_store._get_from_peer(peer, key, return_closer_peers=True)
            assert isinstance(answer, tuple)
            value, closer = answer
            assert value is None or isinstance(value, bytes)
            return value, closer
        self._silent_until[peer] = trio.current_time() + SILENCE_S
        return None

    async def _store_at(self, peer: ID, key: bytes, record: bytes) -> None:
        with trio.move_on_after(QUERY_DEADLINE_S):
            await self._dht.value_store._store_at_peer(peer, key, record)

    @property
    def _dht(self) -> KadDHT:
        assert self._running is not None, "Discovery.run is not running"
        return self._running

    async def learn_connected(self) -> None:
        table = self._dht.routing_table
        for peer in map(ID.from_base58, self._host.connected_peers()):
            if not table.peer_in_table(peer):
                await self._dht.add_peer(peer, skip_server_mode_check=True)

    def forget(self, peer: PeerId) -> None:
        """Hold and hand on nothing of a peer that is no longer a member."""
        self._dht.value_store.remove(_key(peer).encode())
        self._forget(peer)

    def _forget(self, peer: PeerId) -> None:
        self._dht.routing_table.remove_peer(ID.from_base58(peer))


class _AnnouncementValidator(Validator):
    """What KadDHT asks before it stores a value and after it fetched one."""

    def __init__(self, open_record: OpenRecord) -> None:
        self._open = open_record

    def validate(self, key: str, value: bytes) -> None:
        """Raise `InvalidRecord` unless ``value`` is a valid record under its own key."""
        announcement = self._open(value)
        if key != _key(announcement.peer):
            raise InvalidRecord(kind="announcement", problem=f"stored under {key!r}")

    def select(self, key: str, values: list[bytes]) -> int:
        """Return the index of the newest valid value; the first if none is valid."""
        valid: list[tuple[int, Announcement]] = []
        for index, value in enumerate(values):
            with suppress(InvalidRecord):
                valid.append((index, self._open(value)))
        return valid[newest([a for _, a in valid])][0] if valid else 0


def _key(peer: PeerId) -> str:
    return f"/{NAMESPACE}/{peer}"


def _make_dht(host: Host, validator: Validator) -> KadDHT:
    dht = KadDHT(
        host.libp2p_host,
        DHTMode.SERVER,
        validator=NamespacedValidator({NAMESPACE: validator}, strict_validation=True),
        validator_changed=True,
        strict_validation=True,
        enable_providers=False,
        # Members often share one subnet, and each was invited: no Sybils to spread out.
        max_peers_per_subnet=0,
    )
    # Stock resets every query beyond 12 at once; the host limits streams per peer.
    dht._inbound_limiter = trio.CapacityLimiter(INBOUND_QUERIES)
    # It keeps what ADD_PROVIDER names although providers are off.
    dht._check_provider_rate_limit = _refuse_provider
    return dht


def _refuse_provider(peer_id: ID) -> bool:
    return False


_protocols_in_use: list[TProtocol] = []


@contextmanager
def _private_protocol(swarm_id: SwarmId) -> Generator[None]:
    """Give KadDHT the swarm's own protocol id and a short query deadline.

    ``KadDHT(protocol_prefix=…)`` changes nothing on the wire in 0.8.1: its modules read
    these as globals. So all hosts of one process are of one swarm.
    """
    protocol = TProtocol(f"/pals/{short_id(swarm_id)}/kad/1.0.0")
    assert set(_protocols_in_use) <= {protocol}, "one process serves one swarm"
    for module in _MODULES:
        for name, value in (("PROTOCOL_ID", protocol), ("QUERY_TIMEOUT", QUERY_DEADLINE_S)):
            if hasattr(module, name):
                setattr(module, name, value)
    _protocols_in_use.append(protocol)
    try:
        yield
    finally:
        _protocols_in_use.remove(protocol)
