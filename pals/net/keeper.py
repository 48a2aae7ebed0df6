"""Keeps a running member's list, and its swarm secret, as new as anybody knows them.

The backend is polled (`pals.net.polling`), members tell each other by gossip where their
lists end, and ask each other for what they lack; the profile is watched for what a command
of the same profile changed. What all of it means is decided by `pals.swarm.ledger`; this
shell has the clocks, the network and the files. Runs on the trio thread.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import msgspec
import trio

from pals.config import Profile, SwarmEntry, SwarmSecret
from pals.errors import InvalidRecord, PalsError, RosterRefused
from pals.net.backend import Backend
from pals.net.host import Host
from pals.net.membership import keep_list, load_saved, verify_in_thread
from pals.net.polling import Polling
from pals.net.rates import RateLimit
from pals.net.roster_exchange import RosterExchange
from pals.swarm.allowlist import AllowList, AllowState
from pals.swarm.identity import Identity
from pals.swarm.kept import load_removals, removals_path
from pals.swarm.ledger import Action, Alarm, Ask, Cut, End, Ledger, Save, Seek, Tell, Warn
from pals.swarm.news import News, decode_news, encode_news
from pals.swarm.records import decode_entry
from pals.swarm.sealing import open_secret, seal_secret
from pals.types import PeerId, short_id

_log = logging.getLogger(__name__)

DRAIN_S = 60.0
EXPIRY_INTERVAL_S = 5.0
TICK_S = 1.0
WATCH_S = 0.5
SEEK_PAUSE_S = 1.0
SEEK_AT_ONCE = 4
TELL_PAUSE_S = 0.5
ASK_AT_ONCE = 16
OTHERS_ASKED = 2
ASKS_PER_S = 0.5
ASKS_BURST = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a keeper acts upon.

    Attributes:
        profile: Where list and secret are kept, and watched for changes.
        identity: This machine.
        client: The backend.
        host: The running host.
        poll_interval_s: Seconds between two polls, on average.
        publish: Sends news to all members.
        cut: Ends everything with a peer, for a reason.
        end: Ends this node, which is no longer a member.
        expect: Makes no link before the secret of an epoch is there.
        rekey: Enters an epoch with its secret.
    """

    profile: Profile
    identity: Identity
    client: Backend
    host: Host
    poll_interval_s: float
    publish: Callable[[bytes], Awaitable[None]]
    cut: Callable[[PeerId, str], None]
    end: Callable[[], None]
    expect: Callable[[int], None]
    rekey: Callable[[int, bytes], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListReport:
    """How the member list stands on a running node.

    Attributes:
        state: Whether it is in force.
        age_s: Seconds since somebody with authority called it the newest.
        seq: Number of its newest entry.
        epoch: Of the swarm secret, by the list.
        has_secret: Whether this machine holds that secret.
        alarms: What is wrong with the backend, or with an administrator.
    """

    state: AllowState
    age_s: float
    seq: int
    epoch: int
    has_secret: bool
    alarms: tuple[Alarm, ...]


class Keeper:
    """Runs a `Ledger`.

    Args:
        around: What it acts upon.
        ledger: What is known at the start.
        secret: The swarm secret of the ledger's epoch.
        rng: Source of variation.
    """

    def __init__(
        self,
        around: Surroundings,
        ledger: Ledger,
        secret: bytes,
        *,
        rng: random.Random | None = None,
    ) -> None:
        self._around = around
        self._ledger = ledger
        self._secret = secret
        self._rng = rng or random.SystemRandom()
        self._exchange = RosterExchange(around.host, self)
        self._polling = Polling(
            around.client, ledger, self._act, interval_s=around.poll_interval_s, rng=self._rng
        )
        self._asks = RateLimit(per_s=ASKS_PER_S, burst=ASKS_BURST)
        self._limiter = trio.CapacityLimiter(ASK_AT_ONCE)
        self._standing: dict[PeerId, tuple[int, int]] = {}
        self._unsaved, self._seeking, self._changed = trio.Event(), trio.Event(), trio.Event()
        self._seen: tuple[object, ...] = ()
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep list and secret until cancelled.

        Raises:
            InvalidConfig: A file of the profile is damaged.
            ProfileExposed: Others can read one.
        """
        self._seen = self._marks()
        self._around.host.on_connect(self.greet)
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._read_removals()
            for loop in (self._polling.run, self._tick, self._watch, self._save, self._seek):
                nursery.start_soon(loop)
            if self._ledger.roster.epoch > self._ledger.epoch:
                self._act([Seek(self._ledger.roster.epoch)])
            for peer in self._around.host.connected_peers():
                self.greet(peer)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def report(self) -> ListReport:
        """Return how the list stands now."""
        ledger, now = self._ledger, trio.current_time()
        return ListReport(
            state=ledger.allow_list.state(now),
            age_s=ledger.allow_list.age_s(now),
            seq=ledger.roster.seq,
            epoch=ledger.roster.epoch,
            has_secret=ledger.epoch == ledger.roster.epoch,
            alarms=tuple(ledger.alarms.values()),
        )

    async def wait_for_secret(self) -> None:
        """Return when this machine holds the secret of its list's epoch."""
        while self._ledger.epoch < self._ledger.roster.epoch:
            await self._changed.wait()

    # --- what members ask and say ----------------------------------------------------

    def news(self) -> News:
        return self._ledger.news()

    def entries_after(self, seq: int) -> tuple[bytes, ...]:
        return self._ledger.entries[seq + 1 :]

    def on_request(self, peer: PeerId, news: News) -> None:
        """Follow what a member says of its list when it asks for this one's."""
        self._hear(peer, news)

    def sealed_secret(self, peer: PeerId, epoch: int) -> bytes:
        """Return the secret of the current epoch for a member of the current list."""
        ledger = self._ledger
        member = ledger.roster.live.get(peer)
        is_allowed = ledger.allow_list.allows(peer, trio.current_time())
        if member is None or not is_allowed or not epoch == ledger.epoch == ledger.roster.epoch:
            return b""
        swarm_id = ledger.roster.swarm_id
        return seal_secret(
            self._secret, exchange=member.exchange, swarm_id=swarm_id, epoch=epoch, peer=peer
        )

    def judge(self, origin: PeerId, data: bytes) -> bool:
        """Take news by gossip; return whether others are to have them too."""
        try:
            return self._hear(origin, decode_news(data))
        except InvalidRecord as error:
            _log.info("news of peer %s: %s", short_id(origin), error)
            return False

    def _hear(self, peer: PeerId, news: News) -> bool:
        self._note(peer, news)
        forward, actions = self._ledger.heard(peer, news, trio.current_time(), time.time())
        self._act(actions)
        return forward

    def _note(self, peer: PeerId, news: News) -> None:
        """Remember where a member stands, for `all_know`."""
        if peer in self._ledger.roster.live:
            self._standing[peer] = (news.seq, news.epoch)
            self._tell_change()

    # --- acting ----------------------------------------------------------------------

    def _act(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Cut(peer):
                    _log.info("peer %s is no longer a member", short_id(peer))
                    self._standing.pop(peer, None)
                    self._around.cut(peer, "it is no longer a member")
                case End():
                    self._around.end()
                case Save():
                    self._unsaved.set()
                case Tell():
                    self._start(partial(self._around.publish, encode_news(self._ledger.news())))
                case Ask(peer):
                    self.greet(peer)
                case Seek(epoch):
                    self._around.expect(epoch)
                    self._seeking.set()
                case Warn(alarm):
                    _log.warning("%s: %s", alarm.kind, alarm.text)
        if actions:
            self._tell_change()

    def _start(self, task: Callable[[], Awaitable[object]]) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(task)

    def _tell_change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # --- asking members --------------------------------------------------------------

    def greet(self, peer: PeerId) -> None:
        """Compare lists with a member soon, so that both have the later one."""
        if self._asks.allows(peer, trio.current_time()):
            self._start(partial(self._ask, peer))

    async def _ask(self, peer: PeerId) -> None:
        """Compare lists with a member; if it does not answer, with others."""
        others = self._around.host.connected_peers() - {peer}
        asked = [peer, *self._rng.sample(sorted(others), min(OTHERS_ASKED, len(others)))]
        for one in asked:
            with suppress(PalsError):
                await self.compare(one)
                return

    async def compare(self, peer: PeerId) -> None:
        """Compare lists with a member, and take what it has more.

        Raises:
            PeerUnreachable: It does not answer.
            InvalidRecord: Its answer is none.
        """
        async with self._limiter:
            news, entries = await self._exchange.ask_roster(peer)
        if entries:
            await self._take_entries(peer, news, entries)
        self._note(peer, news)
        _, actions = self._ledger.heard(peer, news, trio.current_time(), time.time())
        self._act([action for action in actions if not isinstance(action, Ask)])

    async def _take_entries(self, peer: PeerId, news: News, after: tuple[bytes, ...]) -> None:
        ledger = self._ledger
        first = decode_entry(after[0]).seq
        entries = ledger.entries[:first] + after
        try:
            roster = await verify_in_thread(ledger.roster.swarm_id, entries, ledger.roster)
            self._act(ledger.adopt(entries, roster, trio.current_time()))
        except (InvalidRecord, RosterRefused) as error:
            _log.info("entries of peer %s: %s", short_id(peer), error)
            self._act(ledger.departed(peer, news, after, time.time()))

    async def poll_once(self) -> None:
        """Ask the backend for the list now; see `Polling.poll_once`."""
        await self._polling.poll_once()

    # --- the secret ------------------------------------------------------------------

    async def _seek(self) -> None:
        """Get the secret whenever the list's epoch is later than that of the one held."""
        while True:
            while self._ledger.epoch >= self._ledger.roster.epoch:
                self._seeking = trio.Event()
                await self._seeking.wait()
            if not (await self._read_secret() or await self._ask_for_secret()):
                with trio.move_on_after(SEEK_PAUSE_S):
                    await self._changed.wait()
                    await trio.sleep(SEEK_PAUSE_S / 4)

    async def _ask_for_secret(self) -> bool:
        """Ask connected members, a few at a time, until one gives the right one."""
        epoch = self._ledger.roster.epoch
        peers = sorted(self._around.host.connected_peers())
        self._rng.shuffle(peers)
        limiter = trio.CapacityLimiter(SEEK_AT_ONCE)

        async def ask(peer: PeerId) -> None:
            async with limiter:
                with suppress(PalsError):
                    sealed = await self._exchange.ask_secret(peer, epoch)
                    if sealed and await self._open(peer, epoch, sealed):
                        nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(ask, peer)
        return self._ledger.epoch >= epoch

    async def _open(self, peer: PeerId, epoch: int, sealed: bytes) -> bool:
        ledger, identity = self._ledger, self._around.identity
        try:
            secret = open_secret(
                sealed, identity=identity, swarm_id=ledger.roster.swarm_id, epoch=epoch
            )
            await self._enter(epoch, secret)
        except InvalidRecord as error:
            _log.warning("the secret that peer %s gave: %s", short_id(peer), error)
            return False
        return True

    async def _enter(self, epoch: int, secret: bytes) -> None:
        """Take a secret into use, the profile and the links.

        Raises:
            InvalidRecord: It is not the one of the list's epoch.
        """
        if self._ledger.epoch >= epoch:
            return  # another member was faster
        actions = self._ledger.enter(epoch, secret, trio.current_time())
        self._secret = secret
        self._around.rekey(epoch, secret)
        self._act(actions)
        _log.info("the swarm is in epoch %d of its secret", epoch)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._keep_secret, epoch, SwarmSecret(secret))

    def _keep_secret(self, epoch: int, secret: SwarmSecret) -> None:
        try:
            entry = self._load_entry()
            if entry.epoch < epoch:
                text = secret.to_text()
                changed = msgspec.structs.replace(entry, epoch=epoch, swarm_secret=text)
                self._around.profile.save_swarm(changed)
        except (OSError, PalsError) as error:
            _log.warning("the swarm's new secret could not be saved: %s", error)

    async def _read_secret(self) -> bool:
        """Take the secret that a command of the same profile made, if there is one."""
        epoch = self._ledger.roster.epoch
        try:
            entry = await trio.to_thread.run_sync(self._load_entry)
            if entry.epoch != epoch:
                return False
            await self._enter(epoch, SwarmSecret.parse(entry.swarm_secret).reveal())
        except PalsError as error:
            _log.info("the profile's swarm secret: %s", error)
            return False
        return True

    def _load_entry(self) -> SwarmEntry:
        return self._around.profile.load_swarm(self._ledger.roster.swarm_id.hex())

    # --- the profile -----------------------------------------------------------------

    async def _watch(self) -> None:
        """Follow what a command of the same profile writes."""
        while True:
            await trio.sleep(WATCH_S)
            marks = self._marks()
            if marks != self._seen:
                self._seen = marks
                await self._read_profile()

    def _marks(self) -> tuple[object, ...]:
        swarm_id = self._ledger.roster.swarm_id.hex()
        profile = self._around.profile
        paths = (
            profile.roster_path(swarm_id),
            profile.swarm_folder(swarm_id) / "swarm.json",
            removals_path(profile, self._ledger.roster.swarm_id),
        )
        return tuple(map(_mark, paths))

    async def _read_profile(self) -> None:
        before = self._ledger.news()
        try:
            await self._read_list()
            self._read_removals()
        except PalsError as error:
            _log.warning("%s", error)
        self._seeking.set()
        after = self._ledger.news()
        if (before.seq, before.removals) != (after.seq, after.removals):
            for peer in self._around.host.connected_peers():
                self._start(partial(self._ask, peer))

    async def _read_list(self) -> None:
        ledger, profile = self._ledger, self._around.profile
        load = partial(load_saved, profile, ledger.roster.swarm_id, known=ledger.roster)
        saved = await trio.to_thread.run_sync(load)
        if saved is None:
            return
        now = trio.current_time()
        try:
            self._act(ledger.adopt(saved.held.entries, saved.roster, now))
        except RosterRefused:  # a command was slower than this process, which has more
            self._unsaved.set()
        self._act(ledger.renew(saved.held.word, now, time.time()))

    def _read_removals(self) -> None:
        """Follow removals that the backend has not taken yet."""
        for removal in load_removals(self._around.profile, self._ledger.roster.swarm_id):
            with suppress(InvalidRecord):  # of a member that has come anew since
                self._act(self._ledger.deny(removal))

    async def _save(self) -> None:
        """Write the list when it changed, one write at a time."""
        while True:
            await self._unsaved.wait()
            self._unsaved = trio.Event()
            held, swarm_id = self._ledger.held, self._ledger.roster.swarm_id
            await trio.to_thread.run_sync(keep_list, self._around.profile, swarm_id, held)

    # --- time ------------------------------------------------------------------------

    async def _tick(self) -> None:
        while True:
            self._act(self._ledger.tick(trio.current_time(), time.time()))
            self._asks.purge(trio.current_time())
            self._exchange.purge(trio.current_time())
            await trio.sleep(max(TICK_S, self._ledger.due_at - trio.current_time()))

    async def tell_all(self) -> None:
        """Compare lists with connected members until all have list and secret of this one.

        Cancel it when that takes too long.
        """
        while not self.told() or self.told() < self._around.host.connected_peers():
            async with trio.open_nursery() as nursery:
                for peer in self._around.host.connected_peers() - self.told():
                    nursery.start_soon(self._compare_quietly, peer)
            with trio.move_on_after(TELL_PAUSE_S):
                await self._changed.wait()

    async def _compare_quietly(self, peer: PeerId) -> None:
        with suppress(PalsError):
            await self.compare(peer)

    def told(self) -> frozenset[PeerId]:
        """Return the connected members that have list and secret of this machine."""
        return frozenset(filter(self._knows, self._around.host.connected_peers()))

    def _knows(self, peer: PeerId) -> bool:
        seq, epoch = self._standing.get(peer, (-1, -1))
        return seq >= self._ledger.roster.seq and epoch >= self._ledger.roster.epoch


async def cut_when_expired(allow_list: AllowList, cut: Callable[[], None]) -> None:
    """Call ``cut`` again and again while the list has been expired for `DRAIN_S`.

    New connections are refused from the first second; what runs may end in that time.
    A renewed list ends that by itself.
    """
    warned = False
    while True:
        expired_s = allow_list.expired_s(trio.current_time())
        if expired_s > 0 and not warned:
            _log.warning("the member list expired: nobody may connect until it is renewed")
        warned = expired_s > 0
        if expired_s >= DRAIN_S:
            cut()
        await trio.sleep(EXPIRY_INTERVAL_S)


def _mark(path: os.PathLike[str]) -> object:
    """Return what changes when a file is replaced."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
