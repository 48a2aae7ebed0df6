"""The invites of a swarm as those see them who may make and end them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pals.errors import InviteNotKept, InviteNotOpen, UnknownInvite
from pals.net.administration import MIN_ID_CHARS, Administrator, did_you_mean
from pals.swarm import kept
from pals.swarm.invite import Invite
from pals.swarm.records import Revoke
from pals.swarm.roster import InviteStatus, InviteUse
from pals.types import short_id


@dataclass(frozen=True, slots=True, kw_only=True)
class InviteLine:
    """One invite as `pals invite list` shows it.

    Attributes:
        key: Its public key, whose first characters are its id.
        use: Its certificate and who came by it.
        status: Whether it lets anybody in, or why not.
        is_kept: Whether this profile holds its text.
    """

    key: bytes
    use: InviteUse
    status: InviteStatus | Literal["revoked"]
    is_kept: bool


def list_invites(administrator: Administrator, *, now: float) -> list[InviteLine]:
    """Return the swarm's invites, the oldest first."""
    texts = kept.kept_invites(administrator.profile, administrator.swarm_id)
    revoked = {record.invite for record in administrator.records if isinstance(record, Revoke)}
    return [
        InviteLine(
            key=key,
            use=use,
            status="revoked" if key in revoked else use.status(now),
            is_kept=key in texts,
        )
        for key, use in administrator.roster.invites.items()
    ]


def find_invite(lines: Iterable[InviteLine], wanted: str) -> InviteLine:
    """Return the invite whose id begins with ``wanted``.

    Raises:
        UnknownInvite: There is none, or there are several.
    """
    by_id = {line.key.hex(): line for line in lines}
    is_long = len(wanted) >= MIN_ID_CHARS
    found = [key for key in by_id if is_long and key.startswith(wanted.lower())]
    if len(found) == 1:
        return by_id[found[0]]
    ids = [short_id(line.key) for line in by_id.values()]
    if found:
        advice = f"{len(found)} begin so, write more of the id"
    else:
        advice = did_you_mean(wanted, ids) or "run `pals invite list` to see them"
    raise UnknownInvite(invite=wanted, advice=advice)


def kept_text(administrator: Administrator, line: InviteLine) -> Invite:
    """Return an invite again, to be sent once more.

    Raises:
        InviteNotOpen: It lets nobody in.
        InviteNotKept: This profile did not make it.
    """
    if line.status != "open":
        raise InviteNotOpen(invite=short_id(line.key), status=line.status)
    texts = kept.kept_invites(administrator.profile, administrator.swarm_id)
    if line.key not in texts:
        raise InviteNotKept(invite=short_id(line.key))
    return texts[line.key]


async def revoke_invite(administrator: Administrator, line: InviteLine, *, now: float) -> None:
    """End an invite; who came by it stays a member.

    Raises:
        InviteNotOpen: It was revoked or closed before.
        BackendUnreachable: The backend does not answer.
        BackendRefused: The backend answers with an error.
    """
    if line.use.closed:
        raise InviteNotOpen(invite=short_id(line.key), status=line.status)
    record = Revoke(swarm_id=administrator.swarm_id, invite=line.key, created_at=int(now))
    await administrator.append(record)
    texts = kept.kept_invites(administrator.profile, administrator.swarm_id)
    if line.key in texts:
        kept.drop_invite(administrator.profile, texts[line.key])
