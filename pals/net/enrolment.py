"""What changes a profile's membership: make a swarm, invite, join, remove.

Each step writes to the profile only after the backend accepted it and its answer was
verified, so that a refusal leaves every file as it was. Only the operator's key is written
before, and taken back.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from pals.config import Profile, SwarmEntry, SwarmSecret, read_private, write_private
from pals.errors import (
    AlreadyMember,
    InvalidConfig,
    InvalidRecord,
    NotOperator,
    ProfileMissing,
    RosterRefused,
    UnknownPeer,
)
from pals.net.membership import (
    MembershipClient,
    fetch_roster,
    first_roster,
    load_roster,
    save_roster,
)
from pals.swarm.allowlist import AllowList, AllowState
from pals.swarm.identity import Identity, load_or_create_identity, public_key_of
from pals.swarm.invite import Invite, backend_url_problem
from pals.swarm.keys import secret_commitment
from pals.swarm.records import (
    Genesis,
    InviteCertificate,
    Join,
    Remove,
    decode_entry,
    decode_record,
    digest,
    encode,
    sign_by,
    sign_genesis,
    sign_join,
)
from pals.swarm.roster import Roster, begin
from pals.types import PeerId, SwarmId

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
        AlreadyMember: The profile belongs to a swarm.
        ProfileInUse: Another process enters one with it.
        InvalidConfig: The name, the model or the address cannot be used.
        BackendUnreachable: The backend does not answer.
        BackendRefused: The backend answers with an error.
    """
    _check_backend_url(backend_url)
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
    _check_own_record(record, "the swarm's name or model")
    swarm_id = SwarmId(digest(record))
    # Before the backend knows the swarm: nobody else could ever act for it.
    write_private(profile.operator_key_path(swarm_id.hex()), operator.to_pem())
    try:
        stored = await MembershipClient(backend_url).create_swarm(record)
        begin(swarm_id, decode_entry(stored))
        save_roster(profile, swarm_id, (stored,))
        entry = _entry(genesis, swarm_id, backend_url, epoch=0, secret=secret, receipt=stored)
        profile.save_swarm(entry)
    except BaseException:
        # The folder is this swarm's alone, which has no other member yet.
        shutil.rmtree(profile.swarm_folder(swarm_id.hex()))
        raise
    return entry


async def create_invite(
    profile: Profile,
    *,
    max_uses: int = 1,
    expires_hours: float | None = None,
    note: str = "",
    backend_url: str | None = None,
    now: float,
) -> str:
    """Make an invite and return its text, the only copy there is.

    Args:
        profile: Of the operator.
        max_uses: Machines it lets in.
        expires_hours: Hours until it lets nobody in; None is never.
        note: A reminder that members and the backend can read.
        backend_url: Address of the backend as the joiner reaches it; the operator's own
            when left out.
        now: Unix seconds.

    Raises:
        NoSwarm: The profile belongs to no swarm.
        NotOperator: It does not hold the operator key.
        InvalidConfig: An option is out of range.
        BackendUnreachable: The backend does not answer.
        BackendRefused: The backend answers with an error.
    """
    entry = profile.load_swarm()
    operator = _load_operator(profile, entry)
    joiners_url = backend_url or entry.backend_url
    _check_backend_url(joiners_url)
    swarm_id = _swarm_id(entry)
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
    record = encode(sign_by(certificate, operator))
    _check_own_record(record, "the invite's options")
    await MembershipClient(entry.backend_url).append(swarm_id, record, signer=operator)
    return invite.to_text()


async def redeem_invite(profile: Profile, invite_text: str) -> SwarmEntry:
    """Join the swarm of an invite; may be repeated after a failure on the way.

    Raises:
        InvalidInvite: The text is damaged; nothing was sent.
        AlreadyMember: The profile belongs to a swarm.
        ProfileInUse: Another process enters one with it.
        InviteRefused: The invite is unknown, spent, closed or expired.
        BackendUnreachable: The backend does not answer.
        BackendRefused: The backend answers with an error.
        InvalidRecord: The backend's list does not verify.
        RosterRefused: The backend's list does not show this machine.
    """
    invite = Invite.parse(invite_text)
    with _enrolling(profile) as identity:
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
    client = MembershipClient(invite.backend_url)
    receipt = await client.redeem(invite.swarm_id, invite.auth, record)
    roster, entries, _ = await fetch_roster(client, invite.swarm_id)
    member = roster.live.get(identity.peer_id)
    if member is None or member.joined != digest(record):
        raise RosterRefused(problem="this machine joined and is not on it")
    save_roster(profile, invite.swarm_id, entries)
    entry = _entry(
        roster.genesis,
        invite.swarm_id,
        invite.backend_url,
        epoch=invite.epoch,
        secret=invite.secret,
        receipt=receipt,
    )
    profile.save_swarm(entry)
    return entry


async def remove_peer(profile: Profile, peer: str, *, now: float) -> None:
    """Remove a member, and close the invite it came by.

    Args:
        profile: Of the operator.
        peer: Its whole peer id.
        now: Unix seconds.

    Raises:
        NotOperator: The profile does not hold the operator key.
        UnknownPeer: There is no such live member.
        InvalidConfig: It is this very machine.
        BackendUnreachable: The backend does not answer.
        BackendRefused: The backend answers with an error.
        RosterRefused: The backend's list is not a continuation of the verified one, or
            still shows the peer.
    """
    entry = profile.load_swarm()
    operator = _load_operator(profile, entry)
    swarm_id, client = _swarm_id(entry), MembershipClient(entry.backend_url)
    before = await _renew(profile, swarm_id, client)
    member = before.live.get(PeerId(peer))
    if member is None:
        raise UnknownPeer(peer=peer)
    if peer == load_or_create_identity(profile).peer_id:
        raise InvalidConfig(
            source=f"peer `{peer}`",
            problem="it is this machine, which would lock the operator out",
            advice="choose another peer",
        )
    removal = Remove(
        swarm_id=swarm_id,
        peer=public_key_of(member.peer),
        joined=member.joined,
        created_at=int(now),
    )
    await client.append(swarm_id, encode(sign_by(removal, operator)), signer=operator)
    after = await _renew(profile, swarm_id, client)
    if member.peer in after.members:
        raise RosterRefused(problem="it still shows the removed peer")


async def look_up(profile: Profile) -> Membership:
    """Return the profile's swarm with the newest roster that can be had.

    Raises:
        NoSwarm: The profile belongs to no swarm.
        RosterUnavailable: No verified roster can be had.
    """
    entry = profile.load_swarm()
    allow_list = AllowList()
    client = MembershipClient(entry.backend_url)
    await first_roster(client, _swarm_id(entry), allow_list, profile)
    assert allow_list.roster is not None
    state = allow_list.state(trio.current_time())
    return Membership(entry=entry, roster=allow_list.roster, state=state)


async def _renew(profile: Profile, swarm_id: SwarmId, client: MembershipClient) -> Roster:
    saved = load_roster(profile, swarm_id)
    known = None if saved is None else saved[0]
    roster, entries, _ = await fetch_roster(client, swarm_id, known=known)
    save_roster(profile, swarm_id, entries)
    return roster


@contextmanager
def _enrolling(profile: Profile) -> Generator[Identity]:
    """Give the identity of a profile that may still join, which no other process does."""
    profile.create_folder()
    with profile.enrolment_lock():
        ids = profile.swarm_ids()
        if ids:
            raise AlreadyMember(path=profile.path, swarm=ids[0][:8])
        yield load_or_create_identity(profile)


def _load_operator(profile: Profile, entry: SwarmEntry) -> Identity:
    path = profile.operator_key_path(entry.swarm_id)
    try:
        return Identity.from_pem(read_private(path))
    except ProfileMissing:
        raise NotOperator(path=profile.path) from None
    except ValueError as error:
        raise InvalidConfig(
            source=path, problem=str(error), advice="restore it from a backup"
        ) from error


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
        peer_credential=digest(receipt).hex(),
    )


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


def _check_own_record(record: bytes, source: str) -> None:
    """Turn a record that nobody would accept into the user's error before it is sent."""
    try:
        decode_record(record)
    except InvalidRecord as error:
        raise InvalidConfig(
            source=source,
            problem=str(error.fields["problem"]),
            advice="shorten it, or choose a value in range",
        ) from error


def _check_backend_url(url: str) -> None:
    problem = backend_url_problem(url)
    if problem is not None:
        raise InvalidConfig(
            source="the backend's address",
            problem=f"it {problem}",
            advice="write it as `http://HOST:PORT`",
        )
