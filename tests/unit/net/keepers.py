"""A swarm of keepers on a virtual network and clock, with a backend that a test holds."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import trio
import trio.lowlevel
import trio.testing

from pals.config import Profile, SwarmEntry, SwarmSecret
from pals.errors import BackendUnreachable, PalsError, PeerUnreachable
from pals.net.backend import Backend, FetchedRecords
from pals.net.host import Host, Stream, StreamHandler
from pals.net.keeper import Keeper, Surroundings
from pals.net.membership import REQUEST_DEADLINE_S, keep_list
from pals.swarm.allowlist import AllowList
from pals.swarm.freshness import sign_freshness
from pals.swarm.identity import Identity
from pals.swarm.ledger import Held, Ledger
from pals.swarm.records import digest
from pals.swarm.roster import Roster, verify_chain
from pals.types import PeerId, SwarmId
from tests.unit.swarm.chains import NOW, SECRET, Chain, identity

BACKEND = identity(77)
DELAY_S = 0.05
"""How long a message takes from one member to the next."""
HEARTBEAT_S = 0.5


class Clock:
    """The wall clock of every member: it goes with the virtual one, until a test moves it."""

    def __init__(self) -> None:
        self.offset_s = 0.0

    def time(self) -> float:
        return NOW + trio.current_time() + self.offset_s


@dataclass
class FakeBackend:
    """Serves a chain with its own word, and does whatever else a test sets."""

    chain: Chain
    clock: Clock
    error: PalsError | None = None
    lie: Sequence[bytes] | None = None
    word: bytes | None = None
    gives_word: bool = True
    silence_s: float = 0.0
    asked_at: list[float] = field(default_factory=list)
    etags: list[str] = field(default_factory=list)
    url: str = "http://127.0.0.1:1"
    _rosters: dict[tuple[bytes, ...], Roster] = field(default_factory=dict)

    async def fetch_records(self, swarm_id: SwarmId, *, etag: str = "") -> FetchedRecords:
        self.asked_at.append(trio.current_time())
        self.etags.append(etag)
        await trio.sleep(DELAY_S + self.silence_s)
        if self.error is not None:
            raise self.error
        entries = tuple(self.chain.entries if self.lie is None else self.lie)
        tag = digest(entries[-1]).hex() if entries and entries[-1] else "none"
        return FetchedRecords(
            entries=None if etag == tag else entries, etag=tag, freshness=self._word(entries)
        )

    def _word(self, entries: tuple[bytes, ...]) -> bytes:
        if self.word is not None or not self.gives_word:
            return self.word or b""
        if entries not in self._rosters:
            try:
                self._rosters[entries] = verify_chain(self.chain.swarm_id, entries)
            except PalsError:
                return b""
        roster = self._rosters[entries]
        return sign_freshness(BACKEND, roster, at=int(self.clock.time()))

    def go_away(self) -> None:
        self.error = BackendUnreachable(url=self.url, problem="refused")

    def fall_silent(self) -> None:
        """Take every request and answer none, for as long as a client waits."""
        self.silence_s = REQUEST_DEADLINE_S
        self.error = BackendUnreachable(url=self.url, problem="no answer")


class FakeStream:
    """One end of a stream between two members."""

    def __init__(self, stream: trio.StapledStream, peer_id: PeerId) -> None:
        self._stream = stream
        self._buffer = b""
        self.peer_id = peer_id

    async def read_exactly(self, n: int) -> bytes:
        while len(self._buffer) < n:
            try:
                part = await self._stream.receive_some(65536)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                part = b""
            if not part:
                raise PeerUnreachable(peer=self.peer_id, problem="the stream ended")
            self._buffer += part
        data, self._buffer = self._buffer[:n], self._buffer[n:]
        return data

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise PeerUnreachable(peer=self.peer_id, problem="the stream ended") from None

    async def reset(self) -> None:
        await self._stream.aclose()


class FakeHost:
    """A member's host: it opens streams to those it is connected with, whom both allow."""

    def __init__(self, network: FakeNetwork, machine: Machine) -> None:
        self.peer_id = machine.identity.peer_id
        self.network = network
        self.machine = machine
        self.handlers: dict[str, StreamHandler] = {}
        self.callbacks: list[Callable[[PeerId], None]] = []
        self.connected: set[PeerId] = set()

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        self.handlers[protocol] = handler

    def on_connect(self, callback: Callable[[PeerId], None]) -> None:
        self.callbacks.append(callback)

    def connected_peers(self) -> frozenset[PeerId]:
        return frozenset(self.connected)

    async def open_stream(self, peer: PeerId, protocol: str) -> FakeStream:
        await trio.sleep(DELAY_S)
        other = self.network.machines.get(peer)
        if other is None or peer not in self.connected or not other.allows(self.peer_id):
            raise PeerUnreachable(peer=peer, problem="not connected")
        ours, theirs = trio.testing.memory_stream_pair()
        handler = other.host.handlers.get(protocol)
        if handler is None:
            raise PeerUnreachable(peer=peer, problem=f"it does not serve {protocol}")
        served = FakeStream(theirs, self.peer_id)
        self.network.nursery.start_soon(self.network.serve, handler, served)
        return FakeStream(ours, peer)


class Machine:
    """One member: profile, ledger and keeper."""

    def __init__(self, network: FakeNetwork, who: Identity, folder: Path) -> None:
        self.network = network
        self.identity = who
        self.profile = Profile(folder)
        self.profile.create_folder()
        self.host = FakeHost(network, self)
        self.secrets: dict[int, bytes] = {}
        self.expected: list[int] = []
        self.cut: dict[PeerId, float] = {}
        self.ended: list[float] = []
        self.allow_list = AllowList(max_stale_s=network.max_stale_s)
        self.scope = trio.CancelScope()

    @property
    def peer_id(self) -> PeerId:
        return self.identity.peer_id

    def allows(self, peer: PeerId) -> bool:
        return self.allow_list.allows(peer, trio.current_time())

    def start(self, held: Held, *, epoch: int, secret: bytes, signer: Identity | None) -> None:
        network, chain = self.network, self.network.chain
        roster = verify_chain(chain.swarm_id, held.entries)
        now, now_unix = trio.current_time(), network.clock.time()
        self.allow_list.update(roster, now, age_s=None)
        self.ledger = Ledger(
            own=self.peer_id,
            allow_list=self.allow_list,
            entries=held.entries,
            epoch=epoch,
            signers=(self.identity,) if signer is None else (signer, self.identity),
            rng=random.Random(self.peer_id),
        )
        self.ledger.renew(held.word, now, now_unix)
        self.secrets[epoch] = secret
        keep_list(self.profile, chain.swarm_id, held)
        self.save_secret(epoch, secret)
        around = Surroundings(
            profile=self.profile,
            identity=self.identity,
            client=cast("Backend", network.backend),
            host=cast("Host", self.host),
            poll_interval_s=27.0,
            publish=self._publish,
            cut=self._cut,
            end=lambda: self.ended.append(trio.current_time()),
            expect=self.expected.append,
            rekey=self._rekey,
        )
        self.keeper = Keeper(around, self.ledger, secret, rng=random.Random(self.peer_id))

    def save_secret(self, epoch: int, secret: bytes) -> None:
        self.profile.save_swarm(
            SwarmEntry(
                swarm_id=self.network.chain.swarm_id.hex(),
                name="home",
                model="org/model",
                backend_url="http://127.0.0.1:1",
                epoch=epoch,
                swarm_secret=SwarmSecret(secret).to_text(),
                peer_credential="",
            )
        )

    async def run(self) -> None:
        with self.scope:
            await self.keeper.run()

    def _rekey(self, epoch: int, secret: bytes) -> None:
        assert epoch > max(self.secrets), "links enter later epochs only"
        self.secrets[epoch] = secret

    async def _publish(self, data: bytes) -> None:
        await self.network.gossip(self, data)

    def _cut(self, peer: PeerId, _problem: str) -> None:
        self.cut[peer] = trio.current_time()
        self.network.disconnect(self.peer_id, peer)


@dataclass
class FakeNetwork:
    """Machines that are connected in a ring with chords, and a gossip along it."""

    chain: Chain
    clock: Clock
    folder: Path
    rng: random.Random
    max_stale_s: float = 24 * 3600.0
    has_gossip: bool = True
    machines: dict[PeerId, Machine] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.backend = FakeBackend(self.chain, self.clock)

    @property
    def members(self) -> list[Machine]:
        return list(self.machines.values())

    def add(
        self,
        who: Identity,
        *,
        epoch: int = 0,
        secret: bytes = SECRET.reveal(),
        signer: Identity | None = None,
        entries: Sequence[bytes] | None = None,
        has_word: bool = True,
    ) -> Machine:
        """Start a member with the list of now, or with ``entries``."""
        machine = Machine(self, who, self.folder / who.peer_id[-8:])
        given = tuple(self.chain.entries if entries is None else entries)
        roster = verify_chain(self.chain.swarm_id, given)
        at = int(self.clock.time())
        word = sign_freshness(self.chain.operator, roster, at=at) if has_word else b""
        machine.start(Held(entries=given, word=word), epoch=epoch, secret=secret, signer=signer)
        self.machines[who.peer_id] = machine
        self.nursery.start_soon(machine.run)
        return machine

    def connect(self, one: Machine, other: Machine) -> None:
        for a, b in ((one, other), (other, one)):
            a.host.connected.add(b.peer_id)
        for a, b in ((one, other), (other, one)):
            for callback in a.host.callbacks:
                callback(b.peer_id)

    def connect_all(self) -> None:
        """Connect each with its neighbours in a ring, and some across it."""
        members = self.members
        for index, machine in enumerate(members):
            self.connect(machine, members[index - 1])
            if len(members) > 3:
                across = self.rng.choice(members)
                if across is not machine:
                    self.connect(machine, across)

    def disconnect(self, one: PeerId, other: PeerId) -> None:
        for a, b in ((one, other), (other, one)):
            if a in self.machines:
                self.machines[a].host.connected.discard(b)

    async def serve(self, handler: StreamHandler, stream: FakeStream) -> None:
        try:
            await handler(cast("Stream", stream))
        except PalsError:
            await stream.reset()

    async def gossip(self, origin: Machine, data: bytes) -> None:
        """Flood a message: whoever judges it to be worth it passes it on to neighbours."""
        if not self.has_gossip:
            return
        seen = {origin.peer_id}
        front = [origin]
        while front:
            await trio.sleep(DELAY_S + self.rng.random() * HEARTBEAT_S)
            reached = {
                peer for machine in front for peer in machine.host.connected if peer not in seen
            }
            seen |= reached
            front = [
                self.machines[peer]
                for peer in sorted(reached)
                if peer in self.machines
                and self.machines[peer].allows(origin.peer_id)
                and self.machines[peer].keeper.judge(origin.peer_id, data)
            ]

    def kick(self, who: Identity, epoch: int, secret: bytes) -> None:
        """Let the backend take a removal and the epoch after it."""
        joined = self.chain.roster().live[who.peer_id].joined
        self.chain.append(self.chain.remove(who, joined=joined), at=int(self.clock.time()))
        self.chain.append(self.chain.epoch(epoch, secret=secret), at=int(self.clock.time()))


@asynccontextmanager
async def open_network(
    clock: Clock, folder: Path, *, seed: int = 0, max_stale_s: float = 24 * 3600.0
) -> AsyncIterator[FakeNetwork]:
    """Make a swarm whose backend is appointed, and in which nobody runs yet."""
    chain = Chain()
    chain.append(chain.appoint(BACKEND.public_key, "backend"))
    network = FakeNetwork(chain, clock, folder, random.Random(seed), max_stale_s=max_stale_s)
    async with trio.open_nursery() as nursery:
        network.nursery = nursery
        yield network
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool], *, within_s: float) -> float:
    """Return how many virtual seconds a condition takes to hold; fail after ``within_s``."""
    begun = trio.current_time()
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110 # the clock is virtual
            await trio.sleep(0.05)
    return trio.current_time() - begun
