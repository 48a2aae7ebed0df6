"""A kick and what it takes: a removal, then a new secret that the removed never see.

A removal that the backend does not take is kept in the profile and still goes out to the
members, because to deny is always allowed. Whatever ends a command between its two
records, the next `remove_peer` or `rotate` goes on from there: the new secret is on disk
before the backend hears of its epoch, and in use only after.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from pals.config import Profile, SwarmEntry, SwarmSecret
from pals.errors import InvalidConfig, InvalidRecord, PalsError, UnknownPeer
from pals.net.administration import (
    Administrator,
    find_member,
    open_administrator,
    open_offline,
    take_secret,
)
from pals.swarm import kept
from pals.swarm.identity import load_or_create_identity, peer_id_of, public_key_of
from pals.swarm.keys import secret_commitment
from pals.swarm.records import Epoch, Leave, Record, Remove, decode_record, encode, sign_by
from pals.swarm.roster import Member, Roster, denies
from pals.types import PeerId, short_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """What became of a kick.

    Attributes:
        peer: Who was removed.
        entry: The profile's swarm, with the new secret if there is one.
        is_listed: Whether the backend's list holds the removal; else it goes from member
            to member alone until it does.
        is_rotated: Whether the swarm has a new secret.
        problem: Why one of them is missing.
    """

    peer: PeerId
    entry: SwarmEntry
    is_listed: bool
    is_rotated: bool
    problem: PalsError | None = None


async def remove_peer(
    profile: Profile, peer: str, *, now: float, swarm: str | None = None
) -> Removal:
    """Remove a member, close the invite it came by, and give the swarm a new secret.

    Args:
        profile: Of the operator or an admin.
        peer: Its peer id, or the first or last characters of it.
        now: Unix seconds.
        swarm: Name or id of the swarm; the only one when None.

    Raises:
        NotOperator: The profile holds no key that administers the swarm.
        UnknownPeer: There is no such live member.
        AmbiguousPeer: There are several.
        InvalidConfig: It is this very machine.
        ProfileInUse: Another process changes the membership.
        PalsError: What the backend did, when the peer is on no list that is known.
    """
    profile.check_folder()
    with profile.enrolment_lock():
        administrator = await open_offline(profile, swarm, now=now)
        try:
            member = find_member(administrator.roster, peer)
        except UnknownPeer as unknown:
            return await _finish(administrator, peer, unknown, now)
        _check_not_own(administrator, member)
        try:
            await _remove(administrator, member, now)
        except PalsError as problem:
            return _remove_loosely(administrator, member, now, problem)
        removal = await _rotate_after(administrator, member.peer, now)
        await administrator.save_newest()
        return removal


async def rotate(profile: Profile, *, now: float, swarm: str | None = None) -> SwarmEntry:
    """Give the swarm a new secret, and have the backend take what it missed before.

    Raises:
        NotOperator: The profile holds no key that administers the swarm.
        ProfileInUse: Another process changes the membership.
        BackendUnreachable: The backend does not answer.
        BackendRefused: The backend answers with an error.
        RosterRefused: Its list is not a continuation of the verified one.
    """
    profile.check_folder()
    with profile.enrolment_lock():
        administrator = await open_administrator(profile, swarm, now=now)
        await _append_kept(administrator)
        entry = await _rotate(administrator, now)
        await administrator.save_newest()
        return entry


def needs_rotation(records: tuple[Record, ...]) -> bool:
    """Return whether somebody who knows the secret is no member any more."""
    return any(isinstance(record, Remove | Leave) for record in _since_epoch(records))


def _since_epoch(records: tuple[Record, ...]) -> list[Record]:
    epochs = [i for i, record in enumerate(records) if isinstance(record, Epoch)]
    return list(records[epochs[-1] + 1 :] if epochs else records)


def _check_not_own(administrator: Administrator, member: Member) -> None:
    if member.peer == load_or_create_identity(administrator.profile).peer_id:
        raise InvalidConfig(
            source=f"peer `{short_id(member.peer)}`",
            problem="it is this machine",
            advice="choose another peer, or run `pals swarm leave`",
        )


async def _remove(administrator: Administrator, member: Member, now: float) -> None:
    if administrator.problem is not None:
        raise administrator.problem
    if member.peer not in await _append_kept(administrator):
        await administrator.append(_removal(administrator, member, now))


def _removal(administrator: Administrator, member: Member, now: float) -> Remove:
    return Remove(
        swarm_id=administrator.swarm_id,
        peer=public_key_of(member.peer),
        joined=member.joined,
        created_at=int(now),
    )


def _remove_loosely(
    administrator: Administrator, member: Member, now: float, problem: PalsError
) -> Removal:
    """Keep a removal for members to hear of, and for the backend to take later."""
    profile, roster = administrator.profile, administrator.roster
    waiting = kept.load_removals(profile, roster.swarm_id)
    if member.peer not in {_denied(roster, data) for data in waiting}:
        removal = sign_by(_removal(administrator, member, now), administrator.signer)
        kept.keep_removals(profile, roster.swarm_id, (*waiting, encode(removal)))
    return Removal(
        peer=member.peer,
        entry=administrator.entry,
        is_listed=False,
        is_rotated=False,
        problem=problem,
    )


async def _finish(
    administrator: Administrator, wanted: str, unknown: UnknownPeer, now: float
) -> Removal:
    """End what an earlier removal of a peer that is no member any more began.

    Raises:
        UnknownPeer: No removal of it waits for its new secret.
    """
    if administrator.problem is not None:
        raise administrator.problem
    for record in _since_epoch(administrator.records):
        if isinstance(record, Remove):
            peer = peer_id_of(record.peer)
            if wanted in (peer, short_id(peer)):
                return await _rotate_after(administrator, peer, now)
    raise unknown


async def _rotate_after(administrator: Administrator, peer: PeerId, now: float) -> Removal:
    try:
        entry = await _rotate(administrator, now)
    except PalsError as problem:
        return Removal(
            peer=peer,
            entry=administrator.entry,
            is_listed=True,
            is_rotated=False,
            problem=problem,
        )
    return Removal(peer=peer, entry=entry, is_listed=True, is_rotated=True)


async def _append_kept(administrator: Administrator) -> frozenset[PeerId]:
    """Have the backend take the removals that it missed, and return whom they remove."""
    profile, swarm_id = administrator.profile, administrator.swarm_id
    waiting = kept.load_removals(profile, swarm_id)
    removed: set[PeerId] = set()
    for data in waiting:
        peer = _denied(administrator.roster, data)
        if peer is not None:
            await administrator.append_signed(data)
            removed.add(peer)
    kept.keep_removals(profile, swarm_id, ())
    return frozenset(removed)


def _denied(roster: Roster, data: bytes) -> PeerId | None:
    """Return whom a kept record removes, or None when it has no effect any more."""
    with suppress(InvalidRecord):
        record = decode_record(data)
        if isinstance(record, Remove):
            return denies(roster, record)
    return None


async def _rotate(administrator: Administrator, now: float) -> SwarmEntry:
    """Begin the next epoch; the removals before it are on the list."""
    profile, swarm_id = administrator.profile, administrator.swarm_id
    epoch = administrator.roster.epoch + 1
    secret = _next_secret(profile, administrator, epoch)
    record = Epoch(
        swarm_id=swarm_id,
        number=epoch,
        commitment=secret_commitment(epoch, secret.reveal()),
        created_at=int(now),
    )
    await administrator.append(record)
    entry = take_secret(profile, administrator.entry, epoch, secret)
    kept.drop_next_secret(profile, swarm_id)
    return entry


def _next_secret(profile: Profile, administrator: Administrator, epoch: int) -> SwarmSecret:
    """Return the secret of ``epoch``, on disk: its record may arrive and its answer not."""
    following = kept.load_next_secret(profile, administrator.swarm_id)
    if following is not None and following[0] == epoch:
        return following[1]
    secret = SwarmSecret.generate()
    kept.keep_next_secret(profile, administrator.swarm_id, epoch, secret)
    return secret
