"""Following a membership backend to another address, or to another key."""

from __future__ import annotations

from msgspec.structs import replace

from pals.config import Profile, SwarmEntry
from pals.net.administration import load_operator
from pals.net.backends import open_backend
from pals.net.enrolment import check_backend_url
from pals.net.membership import fetch_list, keep_list, load_saved
from pals.swarm.records import Appoint, Appointment, encode, sign_by
from pals.swarm.roster import Roster
from pals.types import SwarmId


async def move_swarm(profile: Profile, entry: SwarmEntry, url: str, *, now: float) -> bool:
    """Ask the backend at ``url`` for the list from now on.

    Where the profile holds the operator's key, that backend also becomes the only one whose
    word counts that a list is the newest.

    Args:
        profile: Of any member.
        entry: The swarm.
        url: Where the backend answers now.
        now: Unix seconds.

    Returns:
        Whether its word counts; else it does when the operator has done the same.

    Raises:
        InvalidConfig: ``url`` is no address of a backend.
        BackendUnreachable: It does not answer; nothing was changed.
        BackendRefused: It answers with an error; nothing was changed.
        RosterRefused: Its list is not a continuation of the verified one.
    """
    check_backend_url(url)
    swarm_id, client = SwarmId(bytes.fromhex(entry.swarm_id)), open_backend(url, profile)
    newest = await fetch_list(client, swarm_id, load_saved(profile, swarm_id))
    key, operator = await client.fetch_key(), load_operator(profile, entry)
    if operator is not None:
        for other, role in _appointments(newest.roster, key).items():
            record = Appoint(swarm_id=swarm_id, key=other, role=role, created_at=int(now))
            await client.append(swarm_id, encode(sign_by(record, operator)), signer=operator)
        newest = await fetch_list(client, swarm_id, newest)
    keep_list(profile, swarm_id, newest.held)
    profile.save_swarm(replace(entry, backend_url=url))
    return newest.roster.authorities.get(key) == "backend"


def _appointments(roster: Roster, key: bytes) -> dict[bytes, Appointment]:
    """Return what to appoint so that ``key`` is the only backend's."""
    others = (other for other, role in roster.authorities.items() if role == "backend")
    changes: dict[bytes, Appointment] = {other: "none" for other in others if other != key}
    return changes if roster.authorities.get(key) == "backend" else {key: "backend", **changes}
