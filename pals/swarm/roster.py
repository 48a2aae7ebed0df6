"""The roster: who is a member, reduced from the chain of signed records.

A peer is a member if the chain operator -> invite -> peer verifies and nothing removes
it later; an admin that the operator appointed stands for the operator. The backend that
stores the chain can hide its newest entries, but can neither add, reorder nor replace one
without being caught here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from pals.errors import InvalidRecord, RosterRefused, SwarmFull
from pals.swarm.identity import peer_id_of
from pals.swarm.records import (
    NO_ENTRY,
    AdminRecord,
    Appoint,
    Entry,
    Epoch,
    Genesis,
    InviteCertificate,
    Join,
    Leave,
    Record,
    Remove,
    Revoke,
    check_join,
    check_signature,
    decode_entry,
    decode_record,
    digest,
    encode,
    kind_of,
)
from pals.types import PeerId, SwarmId

MAX_MEMBERS = 512
MAX_ENTRIES = 2000
MAX_APPOINTED = 8

Authority = Literal["operator", "admin", "backend"]
InviteStatus = Literal["open", "spent", "expired", "closed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One live member.

    Attributes:
        peer: Its libp2p identity.
        exchange: X25519 key to which secrets for it are sealed.
        invite: Key of the invite it came by; None for the operator's machine.
        joined: Hash of the record that made it a member.
        joined_at: Unix seconds, by the backend's clock.
    """

    peer: PeerId
    exchange: bytes
    invite: bytes | None
    joined: bytes
    joined_at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InviteUse:
    """A certificate and what became of it.

    Attributes:
        certificate: What the operator signed.
        peers: Everybody who ever joined by it, removed or not.
        closed: Whether it was revoked, or a peer who came by it was removed, who knows the
            token.
    """

    certificate: InviteCertificate
    peers: frozenset[PeerId] = frozenset()
    closed: bool = False

    def status(self, now: float) -> InviteStatus:
        """Return whether it lets anybody in at ``now``, Unix seconds, or why not."""
        if self.closed:
            return "closed"
        if len(self.peers) >= self.certificate.max_uses:
            return "spent"
        not_after = self.certificate.not_after
        return "expired" if not_after and now > not_after else "open"


@dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """The state of the swarm after some entries; `apply` returns the next one.

    Attributes:
        swarm_id: SHA-256 of the genesis record.
        genesis: The first record.
        live: Members by their peer id.
        invites: Certificates by their key.
        heads: Hash of every entry so far.
        authorities: What each key may sign.
        epoch: Number of the newest swarm secret.
        commitment: Of that secret; see `pals.swarm.keys.secret_commitment`.
    """

    swarm_id: SwarmId
    genesis: Genesis
    live: Mapping[PeerId, Member]
    invites: Mapping[bytes, InviteUse]
    heads: tuple[bytes, ...]
    authorities: Mapping[bytes, Authority]
    epoch: int
    commitment: bytes

    @property
    def members(self) -> frozenset[PeerId]:
        return frozenset(self.live)

    @property
    def head(self) -> bytes:
        """Hash of the newest entry."""
        return self.heads[-1]

    @property
    def seq(self) -> int:
        """Number of the newest entry."""
        return len(self.heads) - 1

    def may_administer(self, key: bytes) -> bool:
        """Return whether ``key`` signs invites, removals and epochs."""
        return self.authorities.get(key) in ("operator", "admin")

    def extends(self, other: Roster) -> bool:
        """Return whether ``other`` is this roster or an earlier state of it."""
        return self.heads[: len(other.heads)] == other.heads


def begin(swarm_id: SwarmId, entry: Entry) -> Roster:
    """Return the roster after the genesis.

    Raises:
        InvalidRecord: Not a genesis, not the one of ``swarm_id``, or not signed.
    """
    genesis = decode_record(entry.record)
    if not isinstance(genesis, Genesis):
        raise InvalidRecord(kind=kind_of(genesis), problem="the first record is not a genesis")
    if digest(entry.record) != swarm_id:
        raise InvalidRecord(kind="genesis", problem="it is the genesis of another swarm")
    if entry.seq != 0 or entry.previous != NO_ENTRY:
        raise InvalidRecord(kind="genesis", problem="it is not the first entry")
    check_signature(genesis, genesis.operator_signature, genesis.operator, "the operator")
    check_signature(genesis, genesis.peer_signature, genesis.peer, "the peer itself")
    founder = Member(
        peer=peer_id_of(genesis.peer),
        exchange=genesis.exchange,
        invite=None,
        joined=digest(entry.record),
        joined_at=entry.received_at,
    )
    return Roster(
        swarm_id=swarm_id,
        genesis=genesis,
        live={founder.peer: founder},
        invites={},
        heads=(digest(encode(entry)),),
        authorities=MappingProxyType({genesis.operator: "operator"}),
        epoch=0,
        commitment=genesis.commitment,
    )


def apply(roster: Roster, entry: Entry) -> Roster:
    """Return the roster after one more entry.

    Raises:
        InvalidRecord: Not the next entry of this chain, not signed by who may, or against
            what came before.
        SwarmFull: It would be one member too many.
    """
    if entry.seq != roster.seq + 1 or entry.previous != roster.head:
        raise InvalidRecord(kind="entry", problem=f"{entry.seq} does not follow the chain")
    if entry.seq >= MAX_ENTRIES:
        raise InvalidRecord(kind="entry", problem=f"more than {MAX_ENTRIES} entries")
    record = decode_record(entry.record)
    after = _reduce(roster, record, entry)
    return replace(after, heads=(*roster.heads, digest(encode(entry))))


def next_entry(roster: Roster, record: bytes, *, received_at: int) -> Entry:
    """Return the entry that puts ``record`` behind the newest one."""
    return Entry(seq=roster.seq + 1, previous=roster.head, received_at=received_at, record=record)


def verify_chain(
    swarm_id: SwarmId, entries: Sequence[bytes], *, known: Roster | None = None
) -> Roster:
    """Verify a whole chain and return its roster.

    Args:
        swarm_id: The swarm, as the invite or the profile pins it.
        entries: Encoded entries from the genesis on.
        known: A roster verified before; entries it covers are only compared by hash.

    Raises:
        InvalidRecord: A record is malformed, unsigned or in the wrong place.
        RosterRefused: The chain is empty, or does not contain ``known``.
        SwarmFull: More than `MAX_MEMBERS` members.
    """
    if not entries:
        raise RosterRefused(problem="it is empty")
    roster = known or begin(swarm_id, decode_entry(entries[0]))
    done = len(roster.heads)
    if roster.swarm_id != swarm_id or tuple(map(digest, entries[:done])) != roster.heads:
        raise RosterRefused(problem=f"it does not contain entry {done - 1} verified before")
    for data in entries[done:]:
        roster = apply(roster, decode_entry(data))
    return roster


def denies(roster: Roster, record: Remove) -> PeerId | None:
    """Return the member whom a removal ends that the chain does not hold yet, if any.

    To deny is safe before the backend has given the removal its place.

    Raises:
        InvalidRecord: It is for another swarm, or signed by no administrator.
    """
    _check_signer(roster, record)
    peer = peer_id_of(record.peer)
    member = roster.live.get(peer)
    return peer if member is not None and member.joined == record.joined else None


def _reduce(roster: Roster, record: Record, entry: Entry) -> Roster:
    match record:
        case Genesis():
            raise InvalidRecord(kind="genesis", problem="there is one already")
        case Join():
            return _admit(roster, record, entry)
        case Leave():
            return _leave(roster, record)
        case InviteCertificate() | Revoke() | Remove() | Epoch() | Appoint():
            return _administer(roster, record)


def _administer(roster: Roster, record: AdminRecord) -> Roster:
    _check_signer(roster, record)
    match record:
        case InviteCertificate():
            return _add_invite(roster, record)
        case Revoke():
            return _revoke(roster, record)
        case Remove():
            return _remove(roster, record)
        case Epoch():
            return _begin_epoch(roster, record)
        case Appoint():
            return _appoint(roster, record)


def _check_signer(roster: Roster, record: AdminRecord) -> None:
    kind = kind_of(record)
    if record.swarm_id != roster.swarm_id:
        raise InvalidRecord(kind=kind, problem="it is for another swarm")
    operator = roster.genesis.operator
    is_known = record.signer == operator or roster.may_administer(record.signer)
    if not is_known or (isinstance(record, Appoint) and record.signer != operator):
        raise InvalidRecord(kind=kind, problem="not signed by the operator")
    check_signature(record, record.signature, record.signer, "the operator")


def _add_invite(roster: Roster, certificate: InviteCertificate) -> Roster:
    if certificate.invite in roster.invites:
        raise InvalidRecord(kind="invite", problem="there is one with this key already")
    use = InviteUse(certificate=certificate)
    return replace(roster, invites={**roster.invites, certificate.invite: use})


def _revoke(roster: Roster, record: Revoke) -> Roster:
    use = roster.invites.get(record.invite)
    if use is None or use.closed:
        raise InvalidRecord(kind="revoke", problem="there is no such open invite")
    closed = replace(use, closed=True)
    return replace(roster, invites={**roster.invites, record.invite: closed})


def _begin_epoch(roster: Roster, record: Epoch) -> Roster:
    if record.number != roster.epoch + 1:
        raise InvalidRecord(
            kind="epoch", problem=f"{record.number} does not follow epoch {roster.epoch}"
        )
    return replace(roster, epoch=record.number, commitment=record.commitment)


def _appoint(roster: Roster, record: Appoint) -> Roster:
    if record.key == roster.genesis.operator:
        raise InvalidRecord(kind="appoint", problem="the operator's own key keeps its role")
    others = {key: role for key, role in roster.authorities.items() if key != record.key}
    if record.role == "admin" and peer_id_of(record.key) not in roster.live:
        raise InvalidRecord(kind="appoint", problem="an admin has to be a member")
    if record.role == "none":
        return replace(roster, authorities=MappingProxyType(others))
    if len(others) > MAX_APPOINTED:
        raise InvalidRecord(kind="appoint", problem=f"more than {MAX_APPOINTED} appointed keys")
    return replace(roster, authorities=MappingProxyType({**others, record.key: record.role}))


def _admit(roster: Roster, join: Join, entry: Entry) -> Roster:
    check_join(join, roster.swarm_id)
    peer = peer_id_of(join.peer)
    use = roster.invites.get(join.invite)
    if use is None:
        raise InvalidRecord(kind="join", problem="the operator made no such invite")
    problem = _refusal(use, peer, entry.received_at)
    if problem is None and peer in roster.live:
        problem = "the peer is a member already"
    if problem is not None:
        raise InvalidRecord(kind="join", problem=problem)
    if len(roster.live) >= MAX_MEMBERS:
        raise SwarmFull(count=len(roster.live))
    member = Member(
        peer=peer,
        exchange=join.exchange,
        invite=join.invite,
        joined=digest(entry.record),
        joined_at=entry.received_at,
    )
    used = replace(use, peers=use.peers | {peer})
    return replace(
        roster,
        live={**roster.live, peer: member},
        invites={**roster.invites, join.invite: used},
    )


def _refusal(use: InviteUse, peer: PeerId, at: int) -> str | None:
    """Return why an invite does not admit ``peer``, or None."""
    certificate = use.certificate
    if peer in use.peers:
        return "the peer used this invite before"
    if use.closed:
        return "the invite was closed with the removal of a peer who knew it"
    if len(use.peers) >= certificate.max_uses:
        return f"the invite was used {certificate.max_uses} times"
    # The time is the backend's word: an honest one enforces expiry, a hacked one that
    # predates a join still needs somebody who holds the invite.
    if certificate.not_after and at > certificate.not_after:
        return "the invite had expired"
    return None


def _remove(roster: Roster, record: Remove) -> Roster:
    member = _live_member(roster, record)
    without = _without(roster, member.peer)
    if member.invite is None:
        return without
    closed = replace(roster.invites[member.invite], closed=True)
    return replace(without, invites={**roster.invites, member.invite: closed})


def _leave(roster: Roster, record: Leave) -> Roster:
    if record.swarm_id != roster.swarm_id:
        raise InvalidRecord(kind="leave", problem="it is for another swarm")
    check_signature(record, record.signature, record.peer, "the peer itself")
    return _without(roster, _live_member(roster, record).peer)


def _live_member(roster: Roster, record: Remove | Leave) -> Member:
    member = roster.live.get(peer_id_of(record.peer))
    if member is None or member.joined != record.joined:
        raise InvalidRecord(kind=kind_of(record), problem="it ends no live membership")
    return member


def _without(roster: Roster, peer: PeerId) -> Roster:
    """Return the roster without a member, and without what its identity may sign."""
    live = {key: value for key, value in roster.live.items() if key != peer}
    others = {key: role for key, role in roster.authorities.items() if peer_id_of(key) != peer}
    return replace(roster, live=live, authorities=MappingProxyType(others))
