"""What a member makes of the lists, words, removals and secrets that it is given.

Pure: events and the time come in, actions go out. `now` is monotonic seconds, by which the
list ages; `now_unix` only judges the times that others signed. Nothing here believes the
backend or a member: entries come verified, words and removals are verified here, and what
contradicts the verified list is an alarm and changes nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pals.errors import InvalidRecord
from pals.swarm.allowlist import FRESH_S, AllowList
from pals.swarm.freshness import (
    MAX_CLOCK_SKEW_S,
    Freshness,
    open_freshness,
    open_word,
    sign_freshness,
)
from pals.swarm.identity import Identity
from pals.swarm.keys import secret_commitment
from pals.swarm.news import MAX_REMOVALS, News
from pals.swarm.records import (
    Record,
    Remove,
    decode_entry,
    decode_record,
    digest,
    encode,
    kind_of,
)
from pals.swarm.roster import Roster
from pals.types import PeerId, short_id

RENEW_S = 60.0
"""How often an authority says that its list is the newest."""
TELL_S = 60.0
TELL_SPREAD = (0.8, 1.2)
TELL_AGAIN_S = 5.0
SAVE_WORD_S = 600.0

AlarmKind = Literal["rollback", "freeze", "fork"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """The backend, or an authority, showed this member something that cannot be right.

    Attributes:
        kind: ``rollback``: an older list than it showed before. ``freeze``: it hides newer
            entries, or its word is old. ``fork``: there are two lists.
        text: What happened, for people.
        since_unix: When it was noticed.
    """

    kind: AlarmKind
    text: str
    since_unix: int


@dataclass(frozen=True, slots=True)
class Cut:
    """End everything with a peer that is no longer a member."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Save:
    """Keep list, word and removals on disk."""


@dataclass(frozen=True, slots=True)
class Tell:
    """Give the swarm `Ledger.news`."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask a member, or any other, for the entries that this list lacks."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Seek:
    """Get the secret of an epoch from any member; make no link before."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Warn:
    """Tell the user of an alarm, once."""

    alarm: Alarm


@dataclass(frozen=True, slots=True)
class End:
    """This machine is no longer a member."""


Action = Cut | Save | Tell | Ask | Seek | Warn | End


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a profile keeps of the list.

    Attributes:
        entries: The verified chain.
        word: The youngest word that it is the newest, empty for none.
        removals: Removals that it does not hold yet.
    """

    entries: tuple[bytes, ...]
    word: bytes = b""
    removals: tuple[bytes, ...] = ()

    def records(self) -> tuple[Record, ...]:
        """Return what the entries hold, in order."""
        return tuple(decode_record(decode_entry(data).record) for data in self.entries)


@dataclass(slots=True, kw_only=True)
class Ledger:
    """The verified list of a running member, and what is wrong with those that it was shown.

    Attributes:
        own: This machine.
        allow_list: Filled; only this changes it.
        entries: The chain of its roster.
        epoch: Of the secret that this machine holds.
        signers: Keys by which this machine may be an authority.
        rng: Source of variation.
        word: The youngest valid word.
        alarms: What is wrong now.
    """

    own: PeerId
    allow_list: AllowList
    entries: tuple[bytes, ...]
    epoch: int
    signers: Sequence[Identity] = ()
    rng: random.Random = field(default_factory=random.Random)
    word: Freshness | None = None
    alarms: dict[AlarmKind, Alarm] = field(default_factory=dict[AlarmKind, Alarm])
    _word_bytes: bytes = b""
    _saved_at: int = 0
    _polled_seq: int = -1
    _renew_at: float = 0.0
    _tell_at: float = 0.0
    _told_at: float = -TELL_AGAIN_S
    _heard_at: float = -TELL_S

    @property
    def roster(self) -> Roster:
        roster = self.allow_list.roster
        assert roster is not None, "a ledger begins with a verified roster"
        return roster

    @property
    def held(self) -> Held:
        """Return what is worth keeping on disk."""
        removals = tuple(map(encode, self.allow_list.denied.values()))
        return Held(entries=self.entries, word=self._word_bytes, removals=removals)

    def news(self) -> News:
        """Return what other members are told."""
        held, roster = self.held, self.roster
        return News(
            seq=roster.seq,
            head=roster.head,
            epoch=self.epoch,
            freshness=held.word,
            removals=held.removals[:MAX_REMOVALS],
        )

    # --- from the backend ------------------------------------------------------------

    def answered(
        self, entries: tuple[bytes, ...], roster: Roster, word: bytes, now: float, now_unix: float
    ) -> list[Action]:
        """Take the backend's list, which was verified, and its word.

        A word that is missing or not valid renews nothing; when that has lasted, it is an
        alarm. Without one the list is taken all the same: it is signed.
        """
        actions = self.adopt(entries, roster, now)
        self._polled_seq = max(self._polled_seq, roster.seq)
        try:
            given = open_freshness(word, self.roster, now_unix=now_unix)
        except InvalidRecord as error:
            if self.allow_list.age_s(now) > FRESH_S:
                text = f"the backend's word that its list is the newest is none: {error}"
                actions += self._alarm("freeze", text, now_unix)
            return actions
        if given.age_s(now_unix) > MAX_CLOCK_SKEW_S:
            text = (
                f"the backend's word that its list is the newest is {given.age_s(now_unix):.0f} s "
                "old, or this machine's clock is ahead"
            )
            actions += self._alarm("freeze", text, now_unix)
        else:
            self.alarms.pop("freeze", None)
            self.alarms.pop("rollback", None)
        return actions + self.renew(word, now, now_unix)

    def contradicted(self, other: Roster, word: bytes, now_unix: float) -> list[Action]:
        """Say what it means that the backend's list does not contain this one.

        Args:
            other: Its list, which verifies by itself.
            word: The word that came with it.
            now_unix: Unix seconds.
        """
        roster = self.roster
        if not roster.extends(other):
            return self._alarm("fork", _FORK.format(who="the backend", seq=other.seq), now_unix)
        if other.seq < self._polled_seq:
            text = f"the backend shows entry {other.seq} as the last, and showed {self._polled_seq}"
            return self._alarm("rollback", text, now_unix)
        try:
            said = open_freshness(word, other, now_unix=now_unix)
        except InvalidRecord:
            return []
        hidden = decode_entry(self.entries[other.seq + 1])
        if said.at <= hidden.received_at:
            return []  # it came after the answer, and a member was faster
        text = f"the backend hides entry {hidden.seq}, which members have"
        return self._alarm("freeze", text, now_unix)

    # --- from members ----------------------------------------------------------------

    def heard(
        self, peer: PeerId, news: News, now: float, now_unix: float
    ) -> tuple[bool, list[Action]]:
        """Take news of a member; return whether others are to have them too, and what to do."""
        roster, actions = self.roster, list[Action]()
        is_ahead = news.seq > roster.seq
        try:
            word = open_word(news.freshness, roster, now_unix=now_unix) if news.freshness else None
            for removal in news.removals:
                actions += self.deny(removal)
        except InvalidRecord:
            if not is_ahead:  # else a signer may be appointed in what this list lacks
                return False, actions
            word = None
        if is_ahead:
            return True, [*actions, Ask(peer)]
        if roster.heads[news.seq] != news.head:
            return self._hear_fork(peer, news, word, now_unix, actions)
        if news.seq < roster.seq:
            if now >= self._told_at + TELL_AGAIN_S:
                actions += self._tell(now)
            return bool(actions), actions
        if word is not None and self.word is not None and word.at >= self.word.at - RENEW_S / 2:
            self._heard_at = now
        return True, actions + self.renew(news.freshness, now, now_unix)

    def _hear_fork(
        self,
        peer: PeerId,
        news: News,
        word: Freshness | None,
        now_unix: float,
        actions: list[Action],
    ) -> tuple[bool, list[Action]]:
        """Follow a head that is not this list's only if an authority signed it."""
        if word is None or (word.seq, word.head) != (news.seq, news.head):
            return False, actions
        text = _FORK.format(who=f"peer {short_id(peer)}", seq=news.seq)
        return True, actions + self._alarm("fork", text, now_unix)

    def departed(
        self, peer: PeerId, news: News, after: Sequence[bytes], now_unix: float
    ) -> list[Action]:
        """Say what it means that a member's entries do not follow this list.

        It is a fork only if an authority signed the head to which the entries lead; else
        the member made them up.
        """
        try:
            word = open_word(news.freshness, self.roster, now_unix=now_unix)
            chain = [decode_entry(data) for data in after]
        except InvalidRecord:
            return []
        hashes = [digest(data) for data in after]
        is_chain = all(entry.previous == h for entry, h in zip(chain[1:], hashes, strict=False))
        if not chain or not is_chain or (word.seq, word.head) != (chain[-1].seq, hashes[-1]):
            return []
        first = chain[0]
        if not 0 < first.seq <= self.roster.seq + 1:
            return []
        if first.previous == self.roster.heads[first.seq - 1]:
            return []
        text = _FORK.format(who=f"peer {short_id(peer)}", seq=news.seq)
        return self._alarm("fork", text, now_unix)

    # --- from anywhere ---------------------------------------------------------------

    def adopt(self, entries: tuple[bytes, ...], roster: Roster, now: float) -> list[Action]:
        """Take a verified continuation of the list.

        Raises:
            RosterRefused: It is none; nothing has changed then.
        """
        before, listed = self.roster, self.allow_list.listed
        self.allow_list.update(roster, now, age_s=None)
        if roster.seq == before.seq:
            return []
        self.entries = entries
        actions = self._removed(listed - self.allow_list.listed)
        if roster.epoch > self.epoch:
            actions.append(Seek(roster.epoch))
        return [*actions, Save(), *self._tell(now)]

    def deny(self, data: bytes) -> list[Action]:
        """Follow a signed removal that the chain does not hold yet.

        Raises:
            InvalidRecord: It is none, or not signed by an administrator.
        """
        record = decode_record(data)
        if not isinstance(record, Remove):
            raise InvalidRecord(kind=kind_of(record), problem="news hold removals only")
        peer = self.allow_list.deny(record)
        return [] if peer is None else [*self._removed({peer}), Save(), Tell()]

    def renew(self, data: bytes, now: float, now_unix: float) -> list[Action]:
        """Take a word of freshness; only one that is younger than any before renews.

        So a word that is played again says nothing new, whatever the wall clock shows.
        """
        try:
            word = open_freshness(data, self.roster, now_unix=now_unix)
        except InvalidRecord:
            return []
        if self.word is not None and word.at <= self.word.at:
            return []
        self.word, self._word_bytes = word, data
        self.allow_list.update(self.roster, now, age_s=word.age_s(now_unix))
        if word.at < self._saved_at + min(SAVE_WORD_S, self.allow_list.max_stale_s / 4):
            return []
        self._saved_at = word.at
        return [Save()]

    def enter(self, epoch: int, secret: bytes, now: float) -> list[Action]:
        """Note that this machine holds the secret of the list's epoch.

        Raises:
            InvalidRecord: It is of another epoch, or not the one that was committed to.
        """
        check_secret(self.roster, epoch, secret)
        self.epoch = epoch
        return self._tell(now)

    @property
    def due_at(self) -> float:
        """When `tick` has something to do next, unless something else happens."""
        return min(self._renew_at, self._tell_at)

    def tick(self, now: float, now_unix: float) -> list[Action]:
        """Let time pass: renew as an authority, and tell others where this list ends."""
        actions: list[Action] = []
        if now >= self._renew_at:
            self._renew_at, before = now + RENEW_S, self.word
            actions += self._sign(now, now_unix)
            if self.word is not before:
                self._tell_at = now
        if now >= self._tell_at:
            self._tell_at = now + TELL_S * self.rng.uniform(*TELL_SPREAD)
            if self._signer() is not None or now >= self._heard_at + TELL_S:
                actions += self._tell(now)
        return actions

    # --- parts -----------------------------------------------------------------------

    def _sign(self, now: float, now_unix: float) -> list[Action]:
        """Renew the list by this machine's own word, if it is an authority.

        A list that expired, by this clock or by the wall's, is not renewed so: its holder
        may have missed what another authority did since.
        """
        signer = self._signer()
        if signer is None or self.word is None or self.allow_list.state(now) == "expired":
            return []
        if self.word.age_s(now_unix) > self.allow_list.max_stale_s:
            return []
        return self.renew(sign_freshness(signer, self.roster, at=int(now_unix)), now, now_unix)

    def _signer(self) -> Identity | None:
        return next((s for s in self.signers if self.roster.may_administer(s.public_key)), None)

    def _removed(self, peers: frozenset[PeerId] | set[PeerId]) -> list[Action]:
        return [End() if peer == self.own else Cut(peer) for peer in sorted(peers)]

    def _tell(self, now: float) -> list[Action]:
        self._told_at = now
        return [Tell()]

    def _alarm(self, kind: AlarmKind, text: str, now_unix: float) -> list[Action]:
        if kind in self.alarms:
            return []
        self.alarms[kind] = Alarm(kind=kind, text=text, since_unix=int(now_unix))
        return [Warn(self.alarms[kind])]


_FORK = (
    "{who} showed a list that ends with entry {seq} and is not this one: the backend, or an "
    "administrator, keeps two lists"
)


def check_secret(roster: Roster, epoch: int, secret: bytes) -> None:
    """Check a secret against what its epoch committed to.

    Raises:
        InvalidRecord: It is of another epoch than the roster's, or another secret.
    """
    if epoch != roster.epoch:
        problem = f"it is of epoch {epoch}, the list is in epoch {roster.epoch}"
        raise InvalidRecord(kind="swarm secret", problem=problem)
    if secret_commitment(epoch, secret) != roster.commitment:
        raise InvalidRecord(kind="swarm secret", problem="another one was committed to")
