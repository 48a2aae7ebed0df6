"""Meeting members: at the addresses they had, those they leave at the backend, and others.

Every address is a hint: whoever answers must still prove the peer id, and only members are
dialled. What worked is kept in the profile, so that a member that comes back needs neither
the backend nor a command-line option to find the swarm.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from pals.config import KnownPeer, Profile
from pals.errors import InvalidConfig, PalsError
from pals.net.announce import Announcement, useful_first
from pals.net.backend import Backend
from pals.net.host import Host
from pals.swarm.hints import Contacts, open_usable_hints, sign_hint
from pals.swarm.identity import Identity
from pals.types import PeerId, SwarmId, short_id

if TYPE_CHECKING:
    from pals.net.mdns import Neighbour

_log = logging.getLogger(__name__)

HINT_INTERVAL_S = 120.0
DIAL_DEADLINE_S = 5.0
MAX_BOOTSTRAP_PEERS = 8
SAVE_PAUSE_S = 1.0
RETRY_S = 5.0
MAX_ADDRESSES_KEPT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """With whom members are met.

    Attributes:
        profile: Where the members that were reached are remembered.
        identity: Signs this machine's hint.
        swarm_id: The swarm.
        client: The backend, which may be away.
        host: Dials.
        members: Returns those that may be talked to now.
        announcements: Returns what members announce, their addresses with it.
    """

    profile: Profile
    identity: Identity
    swarm_id: SwarmId
    client: Backend
    host: Host
    members: Callable[[], frozenset[PeerId]]
    announcements: Callable[[], Mapping[PeerId, Announcement]]


class Bootstrap:
    """Finds members to connect to, and remembers them.

    Args:
        meeting: With whom.
        named: Addresses from the user, each with ``/p2p/<peer id>`` at its end.

    Raises:
        InvalidConfig: An address names no peer.
    """

    def __init__(self, meeting: Meeting, named: Sequence[str]) -> None:
        self._meeting = meeting
        self._host = meeting.host
        self.contacts = Contacts(_by_peer(named))
        self._failed_at: dict[PeerId, float] = {}
        self._remembered: dict[PeerId, KnownPeer] = {}
        self._reached = trio.Event()
        self._lost = trio.Event()

    async def start(self) -> None:
        """Read what is remembered, and meet members for the first time."""
        await trio.to_thread.run_sync(self._recall)
        self._host.on_connect(lambda _: self._reached.set())
        self._host.on_disconnect(lambda _: self._lost.set())
        await self.meet()

    async def run(self) -> None:
        """Meet members again and again, and remember those that were reached."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_meeting)
            nursery.start_soon(self._keep_company)
            nursery.start_soon(self._keep_remembering)

    async def meet(self) -> None:
        """Say where this machine listens, and connect to a few members."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._connect_to_some)  # the backend may take long
            await self._exchange_hints()
        await self._connect_to_some()

    async def meet_more(self) -> None:
        """Try members that are not connected, a few at a time, and none that failed just now."""
        now = trio.current_time()
        lately = {p for p, failed_at in self._failed_at.items() if now < failed_at + RETRY_S}
        await self._connect(self._strangers() - lately, MAX_BOOTSTRAP_PEERS)

    async def hear(self, neighbour: Neighbour) -> None:
        """Connect to a member where somebody on the local network says that it is."""
        peer = neighbour.peer
        failed_at = self._failed_at.get(peer, -math.inf)
        if peer in self._strangers() and trio.current_time() >= failed_at + RETRY_S:
            await self._try_connect(peer, neighbour.addresses)

    # --- connecting ------------------------------------------------------------------

    async def _keep_meeting(self) -> None:
        while True:
            with trio.move_on_after(HINT_INTERVAL_S):
                await self._host.advertised.wait()
            await self.meet()

    async def _keep_company(self) -> None:
        """Look for members at once when the last connection is lost, and then less often."""
        while True:
            pause_s = RETRY_S
            while not self._host.connected_peers():
                await self.meet_more()
                await trio.sleep(pause_s)
                pause_s = min(2 * pause_s, HINT_INTERVAL_S)
            await self._lost.wait()
            self._lost = trio.Event()

    async def _exchange_hints(self) -> None:
        meeting, now = self._meeting, int(time.time())
        addresses = useful_first(self._host.addresses())
        hint = sign_hint(
            meeting.identity, swarm_id=meeting.swarm_id, addresses=addresses, issued_at=now
        )
        # Peers named by --peer still work without the backend, and hints without one's own.
        with _logged("this machine's address hint was not left"):
            await meeting.client.put_hint(meeting.swarm_id, hint)
        with _logged("no address hints"):
            hints = await meeting.client.fetch_hints(meeting.swarm_id)
            read = partial(open_usable_hints, hints, swarm_id=meeting.swarm_id, now_unix=now)
            members = meeting.members()
            for opened in await trio.to_thread.run_sync(read):
                if opened.peer in members:
                    self.contacts.learn(opened)

    async def _connect_to_some(self) -> None:
        """Connect until enough are, and to one more each time, so that parted groups meet."""
        missing = MAX_BOOTSTRAP_PEERS - len(self._host.connected_peers())
        await self._connect(self._strangers(), max(1, missing))

    def _strangers(self) -> frozenset[PeerId]:
        return self._meeting.members() - self._host.connected_peers() - {self._host.peer_id}

    async def _connect(self, wanted: frozenset[PeerId], count: int) -> None:
        now = int(time.time())
        for peer, announcement in self._meeting.announcements().items():
            self.contacts.remember(peer, announcement.addresses, at=now)
        async with trio.open_nursery() as nursery:
            for peer in self.contacts.choose(wanted, count):
                nursery.start_soon(self._try_connect, peer, self.contacts.addresses(peer))

    async def _try_connect(self, peer: PeerId, addresses: Sequence[str]) -> None:
        try:
            await self._host.connect(peer, addresses, deadline_s=DIAL_DEADLINE_S)
        except PalsError as error:
            self.contacts.failed(peer)
            self._failed_at[peer] = trio.current_time()
            _log.info("peer %s: %s", short_id(peer), error)
        else:
            self.contacts.reached(peer)

    # --- remembering -----------------------------------------------------------------

    def _recall(self) -> None:
        try:
            known = self._meeting.profile.load_known_peers(self._meeting.swarm_id.hex())
        except PalsError as error:
            _log.warning("the members met before are forgotten: %s", error)
            return
        for peer in known:
            self._remembered[PeerId(peer.peer)] = peer
            self.contacts.remember(PeerId(peer.peer), peer.addresses, at=peer.reached_at)

    async def _keep_remembering(self) -> None:
        if self._host.connected_peers():
            self._reached.set()
        while True:
            with trio.move_on_after(HINT_INTERVAL_S):
                await self._reached.wait()
            await trio.sleep(SAVE_PAUSE_S)  # they come in groups, and say who they are
            self._reached = trio.Event()
            known = self._known_now()
            save = partial(self._meeting.profile.save_known_peers, self._meeting.swarm_id.hex())
            with _logged_os_error("the members met are not remembered"):
                await trio.to_thread.run_sync(save, known)

    def _known_now(self) -> list[KnownPeer]:
        """Return the members worth trying first another time, those connected now first."""
        now, announced = int(time.time()), self._meeting.announcements()
        for peer in self._host.connected_peers():
            said = announced[peer].addresses if peer in announced else ()
            heard = (*self._host.known_addresses(peer), *said, *self.contacts.addresses(peer))
            addresses = tuple(dict.fromkeys(heard))[:MAX_ADDRESSES_KEPT]
            if addresses:
                known = KnownPeer(peer=peer, addresses=addresses, reached_at=now)
                self._remembered[peer] = known
        members = self._meeting.members()
        kept = [known for peer, known in self._remembered.items() if peer in members]
        return sorted(kept, key=lambda known: -known.reached_at)


@contextmanager
def _logged(what: str) -> Generator[None]:
    try:
        yield
    except PalsError as error:
        _log.info("%s: %s", what, error)


@contextmanager
def _logged_os_error(what: str) -> Generator[None]:
    try:
        yield
    except OSError as error:
        _log.warning("%s: %s", what, error)


def _by_peer(addresses: Sequence[str]) -> dict[PeerId, tuple[str, ...]]:
    named: dict[PeerId, tuple[str, ...]] = {}
    for address in addresses:
        peer = peer_in(address)
        named[peer] = (*named.get(peer, ()), address)
    return named


def peer_in(address: str) -> PeerId:
    """Return the peer id that ends a multiaddr.

    Raises:
        InvalidConfig: It does not end in ``/p2p/<peer id>``.
    """
    _, separator, peer = address.rpartition("/p2p/")
    if not separator or "/" in peer or not peer:
        raise InvalidConfig(
            source=f"peer `{address}`",
            problem="it does not end in `/p2p/<peer id>`",
            advice="copy the whole address that `pals shard` prints on the other machine",
        )
    return PeerId(peer)
