"""Finding shards: every member holds the table of who serves what.

Three sources fill it with the same signed records. Gossip brings each announcement to all
members within moments, a table request brings a newcomer what was announced before it
came, and the swarm's Kademlia network answers when neither does. Whoever stops answering
is dropped by those that notice and then, after a notice and a question, by all others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import trio

from pals.errors import InvalidRecord, PalsError
from pals.net.announce import Announcement, open_announcement
from pals.net.exchange import TableExchange
from pals.net.gossip import Gossip, Judge
from pals.net.host import Host
from pals.net.kademlia import Kademlia
from pals.net.rates import RateLimit
from pals.net.suspicion import REFUTE_S, Notice, Suspicions, decode_notice, encode_notice
from pals.net.table import LiveTable
from pals.types import PeerId, SwarmId, short_id

_log = logging.getLogger(__name__)

SYNC_INTERVAL_S = 10.0
PROBE_S = 1.5
PROBES_AT_ONCE = 32
PING = "/ipfs/ping/1.0.0"
NEWS_PER_S = 2.0
"""Of one member; a shard announces once a minute and when something changes."""
NEWS_BURST = 32.0
_ANNOUNCEMENT, _NOTICE, _ROSTER = b"\x01", b"\x02", b"\x03"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """From where the table comes beside Kademlia, which is always there.

    Attributes:
        gossip: Hear and pass on what members announce.
        table_requests: Ask members for their tables, and answer them.
    """

    gossip: bool = True
    table_requests: bool = True


ALL_SOURCES = Sources()


class Discovery:
    """Announces this machine's shard, and knows those of other members.

    Args:
        host: The running host; its gate keeps strangers off all of this.
        swarm_id: Names the private protocol and the topic.
        is_member: Says whether a peer is a live member.
        sources: From where the table comes.
        now_unix: Unix time in seconds, by which records expire.
    """

    def __init__(
        self,
        host: Host,
        swarm_id: SwarmId,
        is_member: Callable[[PeerId], bool],
        *,
        sources: Sources = ALL_SOURCES,
        now_unix: Callable[[], float] = time.time,
    ) -> None:
        self._host = host
        self._is_member = is_member
        self._now_unix = now_unix
        self._table = LiveTable()
        self._suspicions = Suspicions()
        self._news = RateLimit(per_s=NEWS_PER_S, burst=NEWS_BURST)
        self._probes = trio.CapacityLimiter(PROBES_AT_ONCE)
        self._changed = trio.Event()
        self._own_record = b""
        self._on_doubt: list[Callable[[], None]] = []
        self.on_roster_news: Judge = _ignore
        """Takes what a member says of its list, and says whether others are to have it too."""
        self._nursery: trio.Nursery | None = None
        self._kademlia = Kademlia(host, swarm_id, self._open)
        self._gossip = Gossip(host, swarm_id, self._judge) if sources.gossip else None
        self._exchange = TableExchange(host, self) if sources.table_requests else None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take part until cancelled; the other methods need this running."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._kademlia.run)
            self._nursery = nursery
            self._host.on_connect(self._on_connected)
            self._host.on_disconnect(self._on_disconnected)
            if self._gossip is not None:
                nursery.start_soon(self._gossip.run)
            for peer in self._host.connected_peers():
                self._on_connected(peer)
            task_status.started()
            try:
                await self._keep_in_step()
            finally:
                self._nursery = None

    # --- what members announce -------------------------------------------------------

    async def announce(self, record: bytes) -> None:
        """Tell the swarm this machine's signed record, and store it in the DHT.

        It holds until it expires, so announce again well before that.

        Raises:
            InvalidRecord: The record does not verify, or is older than one announced before.
        """
        self._own_record = record
        announcement = self._open(record)
        if announcement.seq < self._table.last_seq(announcement.peer):
            raise InvalidRecord(kind="announcement", problem="older than the one before")
        if self._gossip is not None:
            await self._gossip.publish(_ANNOUNCEMENT + record)
        await self._kademlia.put(record)

    def announcements(self) -> dict[PeerId, Announcement]:
        """Return what is known of members that serve or drain now."""
        listed = self._table.announcements(self._now_unix())
        return {peer: a for peer, a in listed.items() if self._is_member(peer)}

    async def find(
        self, peers: Iterable[PeerId], *, deadline_s: float
    ) -> dict[PeerId, Announcement]:
        """Ask the DHT about ``peers``, and return what those of them announce now.

        Never raises because of what peers say or fail to say: those that are silent are
        left out, and what was found by ``deadline_s`` seconds is returned.
        """
        wanted = frozenset(peers)
        await self._kademlia.find(wanted, deadline_s=deadline_s)
        return {peer: a for peer, a in self.announcements().items() if peer in wanted}

    async def wait_for_change(self) -> None:
        """Wait until some announcement comes, changes, goes or may have expired."""
        await self._changed.wait()

    @property
    def hears_news(self) -> bool:
        """Whether announcements come by themselves, without asking the DHT."""
        return self._gossip is not None or self._exchange is not None

    def last_seq(self, peer: PeerId) -> int:
        """Return the highest number of a record of ``peer`` that was seen; -1 for none."""
        return self._table.last_seq(peer)

    # --- who is a member -------------------------------------------------------------

    async def publish_roster_news(self, news: bytes) -> None:
        """Tell all members what this one knows of the list; nothing without gossip."""
        if self._gossip is not None:
            await self._gossip.publish(_ROSTER + news)

    def forget(self, peer: PeerId) -> None:
        """Drop what a peer announced that is no longer a member."""
        self._kademlia.forget(peer)
        if self._table.forget(peer):
            self._tell_change()

    # --- who is gone -----------------------------------------------------------------

    def on_doubt(self, callback: Callable[[], None]) -> None:
        """Call back when members may think wrongly of this machine, and it should announce.

        One said that this machine is gone, or a record of it is newer than its own.
        """
        self._on_doubt.append(callback)

    def report_lost(self, peer: PeerId) -> None:
        """Ask a member that failed whether it is there; if not, drop it and tell others."""
        announcement = self._table.get(peer, self._now_unix())
        if announcement is not None and self._nursery is not None:
            self._nursery.start_soon(self._examine, announcement, True)

    def _on_disconnected(self, peer: PeerId) -> None:
        if self._is_member(peer):  # else it is not listed, nor may it be asked
            self.report_lost(peer)

    def _on_connected(self, peer: PeerId) -> None:
        if self._table.revive(peer):
            self._tell_change()
        if self._nursery is not None:
            self._nursery.start_soon(self._greet, peer)

    async def _greet(self, peer: PeerId) -> None:
        if self._exchange is not None:
            await self._exchange.ask(peer)
        await self._kademlia.learn_connected()

    def _on_notice(self, notice: Notice) -> bool:
        """Follow a notice, and return whether others are to have it too."""
        peer = PeerId(notice.peer)
        announcement = self._table.get(peer, self._now_unix())
        listed = None if announcement is None else announcement.seq
        now = trio.current_time()
        if not self._suspicions.accept(peer, notice.seq, listed_seq=listed, now=now):
            return False
        if peer == self._host.peer_id:
            self._defend()
        elif announcement is not None and self._nursery is not None:
            self._nursery.start_soon(self._examine, announcement, False)
        return True

    async def _examine(self, doubted: Announcement, noticed_here: bool) -> None:
        """Drop a member unless it announces or answers; tell what was noticed here."""
        if not noticed_here:
            await trio.sleep(REFUTE_S)
        if self._table.last_seq(doubted.peer) != doubted.seq or await self._answers(doubted):
            return
        if self._table.drop(doubted.peer, doubted.seq):
            _log.info("peer %s does not answer", short_id(doubted.peer))
            self._tell_change()
            if noticed_here and self._gossip is not None:
                notice = Notice(doubted.peer, doubted.seq)
                await self._gossip.publish(_NOTICE + encode_notice(notice))

    async def _answers(self, announcement: Announcement) -> bool:
        """Return whether a member agrees to a stream, over a new connection if need be.

        It takes a round trip. The ping itself may be refused, to whoever has two at once.
        """
        peer = announcement.peer
        async with self._probes:
            with trio.move_on_after(PROBE_S):
                try:
                    if peer not in self._host.connected_peers():
                        await self._host.connect(peer, announcement.addresses, deadline_s=PROBE_S)
                    await (await self._host.open_stream(peer, PING)).reset()
                except PalsError:
                    return False
                return True
        return False

    # --- records ---------------------------------------------------------------------

    def _open(self, record: bytes) -> Announcement:
        """Verify a record from anywhere; whatever is news goes into the table."""
        now_unix = self._now_unix()
        announcement = open_announcement(record, now_unix=now_unix, is_member=self._is_member)
        if self._table.take(announcement, record, now_unix):
            self._tell_change()
            if announcement.peer == self._host.peer_id and record != self._own_record:
                self._defend()
        return announcement

    def _judge(self, origin: PeerId, message: bytes) -> bool:
        """Take a message of ``origin``, and return whether others are to have it too."""
        if origin == self._host.peer_id:
            return True
        if not self._news.allows(origin, trio.current_time()):
            return False
        kind, data = message[:1], message[1:]
        try:
            if kind == _NOTICE:
                return self._on_notice(decode_notice(data))
            if kind == _ROSTER:
                return self.on_roster_news(origin, data)
            announcement = self._open(data) if kind == _ANNOUNCEMENT else None
        except InvalidRecord as error:
            _log.info("news of peer %s: %s", short_id(origin), error)
            return False
        if announcement is None or announcement.peer != origin:
            return False
        return announcement.seq >= self._table.last_seq(origin)

    def known(self) -> Mapping[PeerId, int]:
        """Return the number of each peer's record, for a table request."""
        return self._table.known()

    def newer_than(self, known: Mapping[str, int]) -> list[bytes]:
        """Return the records that a member lacks who holds those of ``known``."""
        return self._table.newer_than(known, self._now_unix())

    def offer(self, record: bytes) -> None:
        """Take a record that a member sent with its table, if it is valid."""
        try:
            self._open(record)
        except InvalidRecord as error:
            _log.debug("a record of a table: %s", error)

    def _defend(self) -> None:
        for callback in self._on_doubt:
            callback()

    def _tell_change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _keep_in_step(self) -> None:
        """Ask one connected member after another for what was missed."""
        last = PeerId("")
        while True:
            await trio.sleep(SYNC_INTERVAL_S)
            self._table.purge(self._now_unix())
            self._suspicions.purge(trio.current_time())
            self._news.purge(trio.current_time())
            self._tell_change()
            connected = sorted(self._host.connected_peers())
            if connected and self._exchange is not None:
                last = next((peer for peer in connected if peer > last), connected[0])
                await self._exchange.ask(last)


def _ignore(_origin: PeerId, _message: bytes) -> bool:
    return False
