"""`pals peers`: see and remove members."""

from __future__ import annotations

import time
from datetime import UTC, datetime

from pals import config
from pals.cli import console
from pals.cli.options import ConfigDir, Json
from pals.swarm.identity import load_or_create_identity
from pals.swarm.roster import Member
from pals.types import PeerId


async def list_peers(*, config_dir: ConfigDir = None, json: Json = False) -> None:
    """List the members of the swarm.

    Args:
        config_dir: Profile folder.
        json: Print one JSON document on standard output.
    """
    from pals.net.enrolment import look_up

    profile = config.Profile(config.config_dir(config_dir))
    membership = await look_up(profile)
    own = load_or_create_identity(profile).peer_id
    members = sorted(membership.roster.live.values(), key=lambda m: (m.joined_at, m.peer))
    peers = [_describe(member, own) for member in members]
    if json:
        console.json({"schema": 1, "member_list": membership.state, "peers": peers})
        return
    rows = [(p["peer"], p["joined"], p["via"], "yes" if p["self"] else "") for p in peers]
    console.table(("peer", "joined", "via", "this machine"), rows)
    if membership.state != "fresh":
        console.warn("the backend did not answer: this is the last verified list")


async def kick(peer: str, /, *, config_dir: ConfigDir = None) -> None:
    """Remove a member from the swarm and close the invite it came by.

    Args:
        peer: Its whole peer id, as `pals peers list` shows it.
        config_dir: Profile folder.
    """
    from pals.net.enrolment import remove_peer

    profile = config.Profile(config.config_dir(config_dir))
    await remove_peer(profile, peer, now=time.time())
    console.out(f"removed {peer}")


def _describe(member: Member, own: PeerId) -> dict[str, str | bool]:
    joined = datetime.fromtimestamp(member.joined_at, UTC)
    return {
        "peer": member.peer,
        "joined": joined.isoformat(timespec="seconds"),
        "via": "genesis" if member.invite is None else f"invite {member.invite.hex()[:8]}",
        "self": member.peer == own,
    }
