"""How machines come into a swarm, and leave it by themselves: make one, invite, join.

Each step writes to the profile only after the backend accepted it and its answer was
verified, so that a refusal leaves every file as it was. Only the operator's key is written
before, and taken back.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from pals.config import Profile, SwarmEntry, SwarmSecret, write_private
from pals.errors import (
    AlreadyMember,
    BackendRefused,
    BackendUnreachable,
    InvalidConfig,
    InvalidRecord,
    OperatorLeaves,
    RosterRefused,
)
from pals.net.administration import check_own_record, load_operator, open_administrator
from pals.net.backend import Backend
from pals.net.backends import (
    hinted_peers,
    members_address,
    open_backend,
    open_redemption_backend,
)
from pals.net.hosted import invite_address
from pals.net.membership import (
    fetch_roster,
    first_roster,
    load_roster,
    save_roster,
)
from pals.swarm import kept
from pals.swarm.allowlist import AllowList, AllowState
from pals.swarm.hints import AddressHint, open_usable_hints
from pals.swarm.identity import Identity, load_or_create_identity
from pals.swarm.invite import Invite, backend_url_problem
from pals.swarm.kdf import VERSION, extract
from pals.swarm.keys import secret_commitment
from pals.swarm.records import (
    Appoint,
    Genesis,
    InviteCertificate,
    Join,
    Leave,
    decode_entry,
    digest,
    encode,
    sign_by,
    sign_genesis,
    sign_join,
    sign_leave,
)
from pals.swarm.roster import Roster, apply, begin
from pals.types import SwarmId, short_id

SECONDS_PER_HOUR = 3600
MAX_EXPIRY_HOURS = 10 * 365 * 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """A profile's swarm as it is known now.

    Attributes:
        entry: What the profile holds.
        roster: The newest verified roster.
        state: Whether it was renewed just now or is an older one.
    """

    entry: SwarmEntry
    roster: Roster
    state: AllowState


async def create_swarm(
    profile: Profile, *, name: str, model: str, backend_url: str, now: float
) -> SwarmEntry:
    """Make a swarm whose operator and first member this profile is.

    Args:
        profile: Gets an identity if it has none, the operator key and the swarm.
        name: What people call the swarm.
        model: The model it is made for.
        backend_url: Where `pals backend` answers.
        now: Unix seconds.

    Raises:
        ProfileInUse: Another process enters one with it.
        InvalidConfig: The name, the model or the address cannot be used.
        BackendUnreachable: The backend does not answer.
        BackendRefused: The backend answers with an error.
    """
    check_backend_url(backend_url)
    with _enrolling(profile) as identity:
        return await _create_swarm(profile, identity, name, model, backend_url, now)


async def _create_swarm(
    profile: Profile, identity: Identity, name: str, model: str, backend_url: str, now: float
) -> SwarmEntry:
    operator, secret = Identity.generate(), SwarmSecret.generate()
    genesis = Genesis(
        name=name,
        model=model,
        created_at=int(now),
        operator=operator.public_key,
        peer=identity.public_key,
        exchange=_exchange(identity),
        commitment=secret_commitment(0, secret.reveal()),
    )
    record = encode(sign_genesis(genesis, operator=operator, peer=identity))
    check_own_record(record, "the swarm's name or model")
    swarm_id = SwarmId(digest(record))
    # Before the backend knows the swarm: nobody else could ever act for it.
    write_private(profile.operator_key_path(swarm_id.hex()), operator.to_pem())
    try:
        client = open_backend(backend_url, profile)
        backend_key = await _fetch_key(client)
        stored = await client.create_swarm(record)
        roster = begin(swarm_id, decode_entry(stored))
        appointed = await _appoint_backend(client, operator, swarm_id, backend_key, now)
        apply(roster, decode_entry(appointed))
        save_roster(profile, swarm_id, (stored, appointed))
        entry = _entry(genesis, swarm_id, backend_url, epoch=0, secret=secret, receipt=stored)
        profile.save_swarm(entry)
    except BaseException:
        # The folder is this swarm's alone, which has no other member yet.
        shutil.rmtree(profile.swarm_folder(swarm_id.hex()))
        raise
    return entry


async def _fetch_key(client: Backend) -> bytes:
    try:
        return await client.fetch_key()
    except BackendRefused as error:
        raise InvalidConfig(
            source=f"the backend at {client.url}",
            problem=f"it does not say with which key it signs: {error}",
            advice="run `pals backend` of this version there",
        ) from error


async def _appoint_backend(
    client: Backend, operator: Identity, swarm_id: SwarmId, key: bytes, now: float
) -> bytes:
    """Let the backend say how new its lists are, and return the entry that says so."""
    record = Appoint(swarm_id=swarm_id, key=key, role="backend", created_at=int(now))
    return await client.append(swarm_id, encode(sign_by(record, operator)), signer=operator)


async def create_invite(
    profile: Profile,
    *,
    max_uses: int = 1,
    expires_hours: float | None = None,
    note: str = "",
    backend_url: str | None = None,
    now: float,
    swarm: str | None = None,
) -> str:
    """Make an invite and return its text, of which this profile keeps the only copy.

    Args:
        profile: Of the operator or an admin.
        max_uses: Machines it lets in.
        expires_hours: Hours until it lets nobody in; None is never.
        note: A reminder that members and the backend can read.
        backend_url: Address of the backend as the joiner reaches it; the operator's own
            when left out.
        now: Unix seconds.
        swarm: Name or id of the swarm; the only one when None.

    Raises:
        NoSwarm: The profile belongs to no swarm.
        NotOperator: It holds no key that administers the swarm.
        InvalidConfig: An option is out of range.
        BackendUnreachable: The backend does not answer.
        BackendRefused: The backend answers with an error.
    """
    administrator = await open_administrator(profile, swarm, now=now)
    entry, swarm_id = administrator.entry, administrator.swarm_id
    identity = load_or_create_identity(profile)
    joiners_url = invite_address(profile, identity, entry.backend_url, backend_url)
    check_backend_url(joiners_url)
    invite = Invite.generate(
        swarm_id=swarm_id,
        backend_url=joiners_url,
        epoch=entry.epoch,
        secret=SwarmSecret.parse(entry.swarm_secret),
    )
    certificate = InviteCertificate(
        swarm_id=swarm_id,
        invite=invite.signing_key.public_key,
        redeem_hash=invite.redeem_hash,
        max_uses=max_uses,
        not_after=_not_after(expires_hours, now),
        note=note,
    )
    check_own_record(encode(sign_by(certificate, administrator.signer)), "the invite's options")
    # Before the backend knows it: nobody else could ever send it again.
    kept.keep_invite(profile, invite)
    try:
        await administrator.append(certificate)
    except BaseException:
        kept.drop_invite(profile, invite)
        raise
    return invite.to_text()


async def redeem_invite(profile: Profile, invite_text: str) -> SwarmEntry:
    """Join the swarm of an invite; may be repeated after a failure on the way.

    Raises:
        InvalidInvite: The text is damaged; nothing was sent.
        AlreadyMember: The profile belongs to this swarm.
        ProfileInUse: Another process enters one with it.
        InviteRefused: The invite is unknown, spent, closed or expired.
        BackendUnreachable: The backend does not answer.
        BackendRefused: The backend answers with an error.
        InvalidRecord: The backend's list does not verify.
        RosterRefused: The backend's list does not show this machine.
    """
    invite = Invite.parse(invite_text)
    with _enrolling(profile) as identity:
        if invite.swarm_id.hex() in profile.swarm_ids():
            raise AlreadyMember(path=profile.path, swarm=short_id(invite.swarm_id))
        return await _redeem(profile, identity, invite)


async def _redeem(profile: Profile, identity: Identity, invite: Invite) -> SwarmEntry:
    key = invite.signing_key
    join = Join(
        swarm_id=invite.swarm_id,
        invite=key.public_key,
        peer=identity.public_key,
        exchange=_exchange(identity),
    )
    record = encode(sign_join(join, invite=key, peer=identity))
    client = open_redemption_backend(invite.backend_url)
    receipt = await client.redeem(invite.swarm_id, invite.auth, record)
    roster, entries, word = await fetch_roster(client, invite.swarm_id)
    member = roster.live.get(identity.peer_id)
    if member is None or member.joined != digest(record):
        raise RosterRefused(problem="this machine joined and is not on it")
    hints = await _fetch_hints(client, invite.swarm_id)
    save_roster(profile, invite.swarm_id, entries, word)
    profile.save_known_peers(invite.swarm_id.hex(), hinted_peers(hints, roster))
    entry = _entry(
        roster.genesis,
        invite.swarm_id,
        members_address(invite.backend_url, roster, hints),
        epoch=invite.epoch,
        secret=invite.secret,
        receipt=receipt,
    )
    profile.save_swarm(entry)
    return entry


async def _fetch_hints(client: Backend, swarm_id: SwarmId) -> list[AddressHint]:
    """Return where members say that they are; a join does not fail without."""
    try:
        hints = await client.fetch_hints(swarm_id)
    except (BackendRefused, BackendUnreachable):
        return []
    return open_usable_hints(hints, swarm_id=swarm_id, now_unix=time.time())


async def leave_swarm(profile: Profile, entry: SwarmEntry, *, is_forced: bool = False) -> bool:
    """End this machine's membership and delete what the profile holds of the swarm.

    Args:
        profile: Of any member, or of one that was removed.
        entry: The swarm to leave.
        is_forced: Also leave a swarm that nobody could administer then, and delete the
            files when the backend takes no record.

    Returns:
        Whether the list shows it; False if it was left by force without the backend.

    Raises:
        OperatorLeaves: It holds the operator key, and there is no admin.
        ProfileInUse: A server runs with the profile.
        BackendUnreachable: The backend does not answer; nothing was changed.
        BackendRefused: The backend answers with an error; nothing was changed.
        RosterRefused: Its list is not a continuation of the verified one.
    """
    profile.check_folder()
    # A node that runs would write its files again.
    with profile.lock(), profile.enrolment_lock():
        identity = load_or_create_identity(profile)
        try:
            is_listed = await _leave(profile, entry, identity, is_forced=is_forced)
        except (BackendUnreachable, BackendRefused, InvalidRecord, RosterRefused):
            if not is_forced:
                raise
            is_listed = False
        profile.forget_swarm(entry.swarm_id)
    return is_listed


async def _leave(
    profile: Profile, entry: SwarmEntry, identity: Identity, *, is_forced: bool
) -> bool:
    swarm_id, client = _swarm_id(entry), open_backend(entry.backend_url, profile)
    roster = await _fetch_known(profile, swarm_id, client)
    others = {key for key, role in roster.authorities.items() if role == "admin"}
    is_operator = load_operator(profile, entry) is not None
    if is_operator and not is_forced and not others - {identity.public_key}:
        raise OperatorLeaves(swarm=entry.name)
    member = roster.live.get(identity.peer_id)
    if member is not None:
        record = Leave(swarm_id=swarm_id, peer=identity.public_key, joined=member.joined)
        await client.append(swarm_id, encode(sign_leave(record, peer=identity)))
    return True


async def look_up(profile: Profile, wanted: str | None = None) -> Membership:
    """Return one of the profile's swarms with the newest roster that can be had.

    Args:
        profile: Of any member.
        wanted: Name or id of the swarm; the only one when None.

    Raises:
        NoSwarm: The profile belongs to no swarm.
        RosterUnavailable: No verified roster can be had.
    """
    entry = profile.load_swarm(wanted)
    allow_list = AllowList()
    client = open_backend(entry.backend_url, profile)
    await first_roster(client, _swarm_id(entry), allow_list, profile)
    assert allow_list.roster is not None
    state = allow_list.state(trio.current_time())
    return Membership(entry=entry, roster=allow_list.roster, state=state)


async def _fetch_known(profile: Profile, swarm_id: SwarmId, client: Backend) -> Roster:
    saved = load_roster(profile, swarm_id)
    known = None if saved is None else saved[0]
    roster, _, _ = await fetch_roster(client, swarm_id, known=known)
    return roster


@contextmanager
def _enrolling(profile: Profile) -> Generator[Identity]:
    """Give the identity of a profile that no other process enters a swarm with."""
    profile.create_folder()
    with profile.enrolment_lock():
        yield load_or_create_identity(profile)


def _entry(
    genesis: Genesis,
    swarm_id: SwarmId,
    backend_url: str,
    *,
    epoch: int,
    secret: SwarmSecret,
    receipt: bytes,
) -> SwarmEntry:
    return SwarmEntry(
        swarm_id=swarm_id.hex(),
        name=genesis.name,
        model=genesis.model,
        backend_url=backend_url,
        epoch=epoch,
        swarm_secret=secret.to_text(),
        peer_credential=_credential(receipt),
    )


def _credential(receipt: bytes) -> str:
    """Return what a profile keeps of its redemption.

    It is not the hash of the entry, which the next entry holds and every poll may name.
    """
    return extract(VERSION + b"credential", receipt).hex()


def _not_after(expires_hours: float | None, now: float) -> int:
    if expires_hours is None:
        return 0
    if not 0 < expires_hours <= MAX_EXPIRY_HOURS:
        raise InvalidConfig(
            source="the invite's expiry",
            problem=f"{expires_hours:g} hours",
            advice=f"choose more than 0 and at most {MAX_EXPIRY_HOURS} hours",
        )
    return int(now + expires_hours * SECONDS_PER_HOUR)


def _swarm_id(entry: SwarmEntry) -> SwarmId:
    return SwarmId(bytes.fromhex(entry.swarm_id))


def _exchange(identity: Identity) -> bytes:
    return identity.exchange_key().public_key().public_bytes_raw()


def check_backend_url(url: str) -> None:
    """Raise `InvalidConfig` unless ``url`` is the address of a backend."""
    problem = backend_url_problem(url)
    if problem is not None:
        raise InvalidConfig(
            source="the backend's address",
            problem=f"it {problem}",
            advice="write it as `http://HOST:PORT`",
        )
