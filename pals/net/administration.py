"""What the operator and the admins of a swarm sign with, and the roles they give.

Every command opens an `Administrator`, which holds the newest verified list and the key
that signs, sends one record, and writes to the profile only what the backend accepted.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from msgspec.structs import replace

from pals.config import Profile, SwarmEntry, SwarmSecret, create_private, read_private
from pals.errors import (
    AmbiguousPeer,
    InvalidConfig,
    InvalidRecord,
    NotOperator,
    PalsError,
    ProfileMissing,
    RosterRefused,
    UnknownPeer,
)
from pals.net.backend import Backend
from pals.net.backends import open_backend
from pals.net.membership import fetch_list, keep_list, load_saved
from pals.swarm import kept
from pals.swarm.identity import Identity, load_or_create_identity, public_key_of
from pals.swarm.keys import secret_commitment
from pals.swarm.records import (
    AdminRecord,
    Appoint,
    Record,
    decode_entry,
    decode_record,
    encode,
    sign_by,
)
from pals.swarm.roster import Member, Roster
from pals.types import PeerId, SwarmId, short_id

MIN_ID_CHARS = 4
"""Fewer characters name no peer and no invite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Administrator:
    """A profile that may sign for its swarm, and the list that it goes by.

    Attributes:
        profile: Of the operator or an admin.
        entry: What the profile holds of the swarm.
        signer: The key that signs.
        client: The backend.
        roster: The newest verified list.
        records: What the chain of that list holds, in order.
        problem: Why the backend did not give the list, which is then the saved one.
    """

    profile: Profile
    entry: SwarmEntry
    signer: Identity
    client: Backend
    roster: Roster
    records: tuple[Record, ...]
    problem: PalsError | None = None

    @property
    def swarm_id(self) -> SwarmId:
        return self.roster.swarm_id

    async def append(self, record: AdminRecord) -> bytes:
        """Sign a record, have the backend take it, and return its bytes.

        Raises:
            RosterRefused: The backend says that it took the record and does not list it.
        """
        data = encode(sign_by(record, self.signer))
        await self.append_signed(data)
        return data

    async def append_signed(self, record: bytes) -> None:
        """Have the backend take a record that is signed already.

        Raises:
            RosterRefused: The backend says that it took the record and does not list it.
        """
        await self.client.append(self.swarm_id, record, signer=self.signer)
        await self._check_listed(record)

    async def _check_listed(self, record: bytes) -> None:
        """Believe the list alone: who enters an epoch that nobody hears of is there alone."""
        saved = load_saved(self.profile, self.swarm_id)
        newest = await fetch_list(self.client, self.swarm_id, saved)
        if record not in (decode_entry(entry).record for entry in newest.held.entries):
            raise RosterRefused(problem="a record that the backend says it took is not on it")

    async def save_newest(self) -> None:
        """Save the list as it is after what was appended, for a running node to see at once.

        When the backend fails now, members hear of it at their next poll.
        """
        with suppress(PalsError):
            saved = load_saved(self.profile, self.swarm_id)
            newest = await fetch_list(self.client, self.swarm_id, saved)
            keep_list(self.profile, self.swarm_id, newest.held)


async def open_administrator(
    profile: Profile, wanted: str | None = None, *, now: float
) -> Administrator:
    """Return what administers a swarm, with the list renewed.

    It also takes a secret into use that an interrupted rotation brought, and forgets the
    texts of invites that let nobody in any more.

    Args:
        profile: Of the operator or an admin.
        wanted: Name or id of the swarm; the only one when None.
        now: Unix seconds.

    Raises:
        NoSwarm: The profile belongs to no swarm.
        NotOperator: It holds no key that administers this one.
        BackendUnreachable: The backend does not answer.
        BackendRefused: The backend answers with an error.
        InvalidRecord: The backend's list does not verify.
        RosterRefused: It is not a continuation of the verified one.
    """
    administrator = await open_offline(profile, wanted, now=now)
    if administrator.problem is not None:
        raise administrator.problem
    return administrator


async def open_offline(profile: Profile, wanted: str | None, *, now: float) -> Administrator:
    """Do as `open_administrator`, with the saved list when the backend gives none.

    Raises:
        NoSwarm: The profile belongs to no swarm.
        NotOperator: It holds no key that administers this one.
        PalsError: What the backend did, when no list is saved.
    """
    entry = profile.load_swarm(wanted)
    client = open_backend(entry.backend_url, profile)
    swarm_id = SwarmId(bytes.fromhex(entry.swarm_id))
    saved = load_saved(profile, swarm_id)
    problem: PalsError | None = None
    try:
        saved = await fetch_list(client, swarm_id, saved)
    except PalsError as error:
        if saved is None:
            raise
        problem = error
    signer = _load_signer(profile, entry, saved.roster)
    if problem is None:
        keep_list(profile, swarm_id, saved.held)
        entry = _with_next_secret(profile, entry, saved.roster)
        kept.tidy_invites(profile, saved.roster, now)
    return Administrator(
        profile=profile,
        entry=entry,
        signer=signer,
        client=client,
        roster=saved.roster,
        records=saved.held.records(),
        problem=problem,
    )


def load_operator(profile: Profile, entry: SwarmEntry) -> Identity | None:
    """Return the operator's key, or None where the profile does not hold it.

    Raises:
        ProfileExposed: Others can read it.
        InvalidConfig: It is damaged.
    """
    path = profile.operator_key_path(entry.swarm_id)
    try:
        return Identity.from_pem(read_private(path))
    except ProfileMissing:
        return None
    except ValueError as error:
        raise InvalidConfig(
            source=path, problem=str(error), advice="restore it from a backup"
        ) from error


def _load_signer(profile: Profile, entry: SwarmEntry, roster: Roster) -> Identity:
    operator = load_operator(profile, entry)
    if operator is not None:
        return operator
    identity = load_or_create_identity(profile)
    if roster.may_administer(identity.public_key):
        return identity
    raise NotOperator(
        path=profile.path,
        key="operator key, nor that of an admin",
        machine="the machine that made the swarm, or on an admin's",
    )


def _with_next_secret(profile: Profile, entry: SwarmEntry, roster: Roster) -> SwarmEntry:
    """Return the entry with the secret that was kept for an epoch that has begun."""
    following = kept.load_next_secret(profile, roster.swarm_id)
    if following is None or following[0] > roster.epoch:
        return entry
    epoch, secret = following
    # Another administrator may have begun the same epoch with a secret of its own.
    if (epoch, secret_commitment(epoch, secret.reveal())) == (roster.epoch, roster.commitment):
        entry = take_secret(profile, entry, epoch, secret)
    kept.drop_next_secret(profile, roster.swarm_id)
    return entry


def take_secret(profile: Profile, entry: SwarmEntry, epoch: int, secret: SwarmSecret) -> SwarmEntry:
    """Take the secret of a new epoch into the profile and into the invites it keeps."""
    entry = replace(entry, epoch=epoch, swarm_secret=secret.to_text())
    profile.save_swarm(entry)
    for invite in kept.kept_invites(profile, SwarmId(bytes.fromhex(entry.swarm_id))).values():
        kept.keep_invite(profile, invite.with_secret(epoch=epoch, secret=secret))
    return entry


# --- roles ---------------------------------------------------------------------------


async def appoint(
    administrator: Administrator, peer: str, role: Literal["admin", "none"], *, now: float
) -> PeerId:
    """Make a member an admin, or end that, and return its peer id.

    Raises:
        NotOperator: The profile does not hold the operator key.
        UnknownPeer: There is no such member.
        AmbiguousPeer: There are several.
        InvalidConfig: It is the operator's own machine, or one admin too many.
        BackendUnreachable: The backend does not answer.
        BackendRefused: The backend answers with an error.
    """
    _check_operator(administrator)
    member = find_member(administrator.roster, peer)
    record = Appoint(
        swarm_id=administrator.swarm_id,
        key=public_key_of(member.peer),
        role=role,
        created_at=int(now),
    )
    await administrator.append(record)
    return member.peer


def _check_operator(administrator: Administrator) -> None:
    if administrator.signer.public_key != administrator.roster.genesis.operator:
        raise _not_operator(administrator.profile)


def find_member(roster: Roster, wanted: str) -> Member:
    """Return the live member whose peer id begins or ends with ``wanted``.

    Raises:
        UnknownPeer: There is none.
        AmbiguousPeer: There are several.
    """
    exact = roster.live.get(PeerId(wanted))
    if exact is not None:
        return exact
    is_long = len(wanted) >= MIN_ID_CHARS
    found = [p for p in roster.live if is_long and (p.startswith(wanted) or p.endswith(wanted))]
    if len(found) == 1:
        return roster.live[found[0]]
    if found:
        listed = ", ".join(sorted(map(short_id, found))[:8])
        raise AmbiguousPeer(peer=wanted, known=listed)
    ids = [*roster.live, *map(short_id, roster.live)]
    advice = did_you_mean(wanted, ids) or "run `pals peers list` to see the members"
    raise UnknownPeer(peer=wanted, advice=advice)


def did_you_mean(wanted: str, ids: Iterable[str]) -> str:
    """Return the id that was probably meant, as a question; nothing when none is near."""
    nearest = get_close_matches(wanted, ids, n=1)
    return f"did you mean `{nearest[0]}`?" if nearest else ""


# --- the operator's key --------------------------------------------------------------


def operator_pem(profile: Profile, entry: SwarmEntry) -> bytes:
    """Return the operator's key as an unencrypted PEM file.

    Raises:
        NotOperator: The profile does not hold it.
    """
    operator = load_operator(profile, entry)
    if operator is None:
        raise _not_operator(profile)
    return operator.to_pem()


def import_key(profile: Profile, entry: SwarmEntry, pem: bytes) -> None:
    """Make this member's profile an operator's, with a key exported on another machine.

    Raises:
        InvalidConfig: It is no key, not this swarm's, or there is one already.
    """
    try:
        operator = Identity.from_pem(pem)
    except ValueError as error:
        raise _bad_key(str(error)) from None
    saved = load_saved(profile, SwarmId(bytes.fromhex(entry.swarm_id)))
    if saved is None or saved.roster.genesis.operator != operator.public_key:
        raise _bad_key(f"it is not that of the operator of `{entry.name}`")
    try:
        create_private(profile.operator_key_path(entry.swarm_id), operator.to_pem())
    except FileExistsError:
        raise _bad_key("this profile holds it already") from None


def _bad_key(problem: str) -> InvalidConfig:
    return InvalidConfig(
        source="the operator key",
        problem=problem,
        advice="take the file that `pals swarm export-key` wrote for this swarm",
    )


def _not_operator(profile: Profile) -> NotOperator:
    return NotOperator(
        path=profile.path, key="operator key", machine="the machine that made the swarm"
    )


def check_own_record(record: bytes, source: str) -> None:
    """Turn a record that nobody would accept into the user's error before it is sent."""
    try:
        decode_record(record)
    except InvalidRecord as error:
        raise InvalidConfig(
            source=source,
            problem=str(error.fields["problem"]),
            advice="shorten it, or choose a value in range",
        ) from error
