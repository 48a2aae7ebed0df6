"""`pals invite`: let other machines in, and stop doing so."""

from __future__ import annotations

import io
import time
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import urlsplit

from cyclopts import Parameter, validators

from pals import config
from pals.cli import console
from pals.cli.formats import format_moment
from pals.cli.options import ConfigDir, Json, SwarmName
from pals.config import Profile
from pals.swarm.addresses import host_in, is_peer_address
from pals.swarm.records import MAX_INVITE_USES
from pals.types import short_id

if TYPE_CHECKING:
    from pals.net.invites import InviteLine
    from pals.swarm.invite import Invite

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})

Qr = Annotated[
    bool, Parameter(name="--qr", negative="", help="Also print the invite as a QR code.")
]
Status = Literal["open", "spent", "revoked", "expired", "closed"]


async def create(
    *,
    max_uses: Annotated[
        int, Parameter(validator=validators.Number(gte=1, lte=MAX_INVITE_USES))
    ] = 1,
    expires_hours: float | None = None,
    note: str = "",
    backend: str | None = None,
    qr: Qr = False,
    swarm: SwarmName = None,
    config_dir: ConfigDir = None,
    json: Json = False,
) -> None:
    """Make an invite and print the command that the other machine runs.

    The invite holds the swarm's secret: hand it over as you would a password.

    Args:
        max_uses: Machines it lets in.
        expires_hours: Hours until it lets nobody in; never when left out.
        note: A reminder that members and the backend can read.
        backend: Address of the backend as the other machine reaches it.
        qr: Also print the invite as a QR code.
        swarm: Name or id of the swarm.
        config_dir: Profile folder.
        json: Print one JSON document on standard output.
    """
    from pals.net.enrolment import create_invite
    from pals.swarm.invite import Invite

    text = await create_invite(
        Profile(config.config_dir(config_dir)),
        max_uses=max_uses,
        expires_hours=expires_hours,
        note=note,
        backend_url=backend,
        now=time.time(),
        swarm=swarm,
    )
    _print_invite(Invite.parse(text), qr=qr, json=json)


async def list_invites(
    *,
    status: Status | None = None,
    swarm: SwarmName = None,
    config_dir: ConfigDir = None,
    json: Json = False,
) -> None:
    """List the swarm's invites.

    Args:
        status: Only those that are `open`, `spent`, `revoked`, `expired`, or `closed` because
            a machine that came by them was removed.
        swarm: Name or id of the swarm.
        config_dir: Profile folder.
        json: Print one JSON document on standard output.
    """
    lines = [line for line in await _lines(config_dir, swarm) if status in (None, line.status)]
    if json:
        console.json({"schema": 1, "invites": [_describe(line) for line in lines]})
        return
    rows = [
        (
            short_id(line.key),
            line.status,
            f"{len(line.use.peers)}/{line.use.certificate.max_uses}",
            format_moment(line.use.certificate.not_after) or "never",
            line.use.certificate.note,
        )
        for line in lines
    ]
    console.table(("invite", "status", "used", "expires", "note"), rows)


async def resend(
    invite: str,
    /,
    *,
    qr: Qr = False,
    swarm: SwarmName = None,
    config_dir: ConfigDir = None,
    json: Json = False,
) -> None:
    """Print the command of an open invite again, on the machine that made it.

    Args:
        invite: Its id, as `pals invite list` shows it.
        qr: Also print the invite as a QR code.
        swarm: Name or id of the swarm.
        config_dir: Profile folder.
        json: Print one JSON document on standard output.
    """
    from pals.net import administration, invites

    profile, now = Profile(config.config_dir(config_dir)), time.time()
    administrator = await administration.open_administrator(profile, swarm, now=now)
    line = invites.find_invite(invites.list_invites(administrator, now=now), invite)
    _print_invite(invites.kept_text(administrator, line), qr=qr, json=json)


async def revoke(
    invite: str, /, *, swarm: SwarmName = None, config_dir: ConfigDir = None, json: Json = False
) -> None:
    """End an invite; machines that came by it stay members.

    Args:
        invite: Its id, as `pals invite list` shows it.
        swarm: Name or id of the swarm.
        config_dir: Profile folder.
        json: Print one JSON document on standard output.
    """
    from pals.net import administration, invites

    profile, now = Profile(config.config_dir(config_dir)), time.time()
    administrator = await administration.open_administrator(profile, swarm, now=now)
    line = invites.find_invite(invites.list_invites(administrator, now=now), invite)
    await invites.revoke_invite(administrator, line, now=now)
    if json:
        console.json({"schema": 1, "id": short_id(line.key), "status": "revoked"})
    else:
        console.out(f"revoked {short_id(line.key)}")


async def _lines(config_dir: ConfigDir, swarm: SwarmName) -> list[InviteLine]:
    from pals.net import administration, invites

    profile, now = Profile(config.config_dir(config_dir)), time.time()
    administrator = await administration.open_administrator(profile, swarm, now=now)
    return invites.list_invites(administrator, now=now)


def _describe(line: InviteLine) -> dict[str, object]:
    certificate = line.use.certificate
    return {
        "id": short_id(line.key),
        "status": line.status,
        "used": len(line.use.peers),
        "max_uses": certificate.max_uses,
        "expires": format_moment(certificate.not_after) or None,
        "note": certificate.note,
        "peers": sorted(line.use.peers),
        "kept": line.is_kept,
    }


def _print_invite(invite: Invite, *, qr: bool, json: bool) -> None:
    """Print the whole command of the other machine, in which argv holds no secret."""
    text = invite.to_text()
    command = f"{config.INVITE_VARIABLE}={text} pals login"
    key = short_id(invite.signing_key.public_key)
    if json:
        console.json(
            {
                "schema": 1,
                "id": key,
                "invite": text,
                "command": command,
                "backend": invite.backend_url,
            }
        )
    else:
        console.out(command)
        if qr:
            console.out(_qr_code(text))
        console.note(f"invite {key}: run this line on the other machine")
        console.note("with `pals join` in place of `pals login` it serves layers at once")
    _warn_of_loopback(invite.backend_url)


def _qr_code(text: str) -> str:
    import segno

    drawn = io.StringIO()
    segno.make_qr(text, error="l").terminal(out=drawn, compact=True)
    return drawn.getvalue().rstrip("\n")


def _warn_of_loopback(address: str) -> None:
    host = host_in(address) if is_peer_address(address) else urlsplit(address).hostname
    if host in LOOPBACK_HOSTS:
        console.warn(
            f"the invite names the backend `{address}`, which only this machine reaches; "
            "for another machine give its address with `--backend`"
        )
