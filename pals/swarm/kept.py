"""What a profile keeps for those who administer a swarm, beside its swarm.json.

The texts of open invites, which no server knows; the secret that a rotation is about to
bring, so that nothing is lost when the answer is; and removals that the backend has not
taken yet.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from pals.config import Profile, SwarmSecret, read_private, write_private
from pals.errors import InvalidConfig, InvalidInvite, ProfileMissing
from pals.swarm.invite import Invite
from pals.swarm.messages import RecordBytes
from pals.swarm.records import MAX_EPOCH
from pals.swarm.roster import MAX_MEMBERS, Roster
from pals.types import SwarmId

_T = TypeVar("_T")


class NextSecret(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The secret of an epoch that may have begun; its repr does not show it.

    Attributes:
        epoch: Its number.
        secret: In the text form of `SwarmSecret`.
    """

    epoch: Annotated[int, Meta(ge=1, lt=MAX_EPOCH)]
    secret: Annotated[str, Meta(max_length=64)]

    def __repr__(self) -> str:
        return f"NextSecret(epoch={self.epoch})"


class _Removals(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    records: Annotated[tuple[RecordBytes, ...], Meta(max_length=MAX_MEMBERS)]


# --- invites -------------------------------------------------------------------------


def keep_invite(profile: Profile, invite: Invite) -> None:
    """Keep the text of an invite, in place of an older form of it."""
    write_private(_invite_path(profile, invite), invite.to_text().encode())


def kept_invites(profile: Profile, swarm_id: SwarmId) -> dict[bytes, Invite]:
    """Return the kept invites of a swarm by their public keys.

    Raises:
        ProfileExposed: Others can read one.
        InvalidConfig: One is damaged.
    """
    invites: dict[bytes, Invite] = {}
    for path in sorted(_invites_folder(profile, swarm_id).glob("*.invite")):
        try:
            invite = Invite.parse(read_private(path).decode())
        except (InvalidInvite, UnicodeDecodeError) as error:
            raise _damaged(path, str(error)) from None
        invites[invite.signing_key.public_key] = invite
    return invites


def tidy_invites(profile: Profile, roster: Roster, now: float) -> None:
    """Forget the texts of invites that let nobody in any more at ``now``, Unix seconds."""
    for key, invite in kept_invites(profile, roster.swarm_id).items():
        use = roster.invites.get(key)
        if use is None or use.status(now) != "open":
            drop_invite(profile, invite)


def drop_invite(profile: Profile, invite: Invite) -> None:
    """Delete the text of an invite, if it is kept."""
    _invite_path(profile, invite).unlink(missing_ok=True)


# --- the next secret -----------------------------------------------------------------


def keep_next_secret(profile: Profile, swarm_id: SwarmId, epoch: int, secret: SwarmSecret) -> None:
    """Keep the secret of the epoch that is about to begin."""
    following = NextSecret(epoch=epoch, secret=secret.to_text())
    write_private(_next_path(profile, swarm_id), msgspec.json.encode(following))


def load_next_secret(profile: Profile, swarm_id: SwarmId) -> tuple[int, SwarmSecret] | None:
    """Return the epoch and the secret that were kept, or None.

    Raises:
        ProfileExposed: Others can read it.
        InvalidConfig: It is damaged.
        SwarmSecretInvalid: It holds no secret.
    """
    path = _next_path(profile, swarm_id)
    data = _read(path)
    if data is None:
        return None
    following = _decode(msgspec.json.Decoder(NextSecret), path, data)
    return following.epoch, SwarmSecret.parse(following.secret)


def drop_next_secret(profile: Profile, swarm_id: SwarmId) -> None:
    """Delete the secret that was kept, if there is one."""
    _next_path(profile, swarm_id).unlink(missing_ok=True)


# --- removals ------------------------------------------------------------------------


def removals_path(profile: Profile, swarm_id: SwarmId) -> Path:
    """Return the file of the removals; a running node watches it."""
    return profile.swarm_folder(swarm_id.hex()) / "removals.bin"


def keep_removals(profile: Profile, swarm_id: SwarmId, records: tuple[bytes, ...]) -> None:
    """Keep removals that the backend has still to take, in place of those kept before."""
    path = removals_path(profile, swarm_id)
    if records:
        write_private(path, msgspec.msgpack.encode(_Removals(records)))
    else:
        path.unlink(missing_ok=True)


def load_removals(profile: Profile, swarm_id: SwarmId) -> tuple[bytes, ...]:
    """Return the removals that were kept.

    Raises:
        ProfileExposed: Others can read them.
        InvalidConfig: The file is damaged.
    """
    path = removals_path(profile, swarm_id)
    data = _read(path)
    return () if data is None else _decode(msgspec.msgpack.Decoder(_Removals), path, data).records


# --- files ---------------------------------------------------------------------------


def _invites_folder(profile: Profile, swarm_id: SwarmId) -> Path:
    return profile.swarm_folder(swarm_id.hex()) / "invites"


def _invite_path(profile: Profile, invite: Invite) -> Path:
    name = f"{invite.signing_key.public_key.hex()}.invite"
    return _invites_folder(profile, invite.swarm_id) / name


def _next_path(profile: Profile, swarm_id: SwarmId) -> Path:
    return profile.swarm_folder(swarm_id.hex()) / "next.json"


def _read(path: Path) -> bytes | None:
    with suppress(ProfileMissing):
        return read_private(path)
    return None


def _decode(
    decoder: msgspec.json.Decoder[_T] | msgspec.msgpack.Decoder[_T], path: Path, data: bytes
) -> _T:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # Without msgspec's text, which may quote the secret.
        raise _damaged(path, "not what was written there") from None


def _damaged(path: Path, problem: str) -> InvalidConfig:
    return InvalidConfig(source=path, problem=problem, advice="remove it")
