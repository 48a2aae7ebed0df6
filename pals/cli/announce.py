"""Tells the running members of a change at once, instead of at their next poll."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pals import config
from pals.cli import console
from pals.config import Profile, SwarmEntry
from pals.errors import PalsError
from pals.settings import NodeSettings
from pals.types import SwarmId

if TYPE_CHECKING:
    from pals.net.telling import Told


async def tell_members(profile: Profile, entry: SwarmEntry) -> None:
    """Let the members that are online have a changed list, and a new secret, now.

    What cannot be told now is no failure of the command: members ask the backend, and each
    other.
    """
    settings = config.load_settings().node
    if not settings.peers and not await has_anybody_run(profile, entry):
        return
    try:
        told = await _tell(profile, entry, settings)
    except PalsError as error:
        console.note(f"members were not told now, and hear of it at their next poll: {error}")
        return
    if not told.is_running:
        console.note(f"told {told.told} of {told.connected} members that are connected")


async def _tell(profile: Profile, entry: SwarmEntry, settings: NodeSettings) -> Told:
    from pals.net.telling import announce_change  # libp2p takes long to import

    return await announce_change(profile, entry, settings)


async def has_anybody_run(profile: Profile, entry: SwarmEntry) -> bool:
    """Return whether any other member ever said where it is, or was met."""
    from pals.net.membership import load_saved
    from pals.net.presence import fetch_sightings
    from pals.swarm.identity import load_or_create_identity

    saved = load_saved(profile, SwarmId(bytes.fromhex(entry.swarm_id)))
    if saved is None:
        return False
    others = saved.roster.members - {load_or_create_identity(profile).peer_id}
    return not others.isdisjoint(await fetch_sightings(profile, entry))
