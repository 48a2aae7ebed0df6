"""Tells the running members of a change at once, instead of at their next poll."""

from __future__ import annotations

from pals.config import Profile, SwarmEntry


async def tell_members(profile: Profile, entry: SwarmEntry) -> None:
    """Placeholder until the keeper's announcement is there."""
