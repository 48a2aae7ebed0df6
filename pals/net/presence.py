"""When members were last seen: what `pals peers list` shows beside the list itself."""

from __future__ import annotations

import time
from collections.abc import Mapping

from pals.config import Profile, SwarmEntry
from pals.errors import PalsError
from pals.net.backends import open_backend
from pals.swarm.hints import AddressHint, open_usable_hints
from pals.types import PeerId, SwarmId

HINTS_S = 5.0


async def fetch_sightings(profile: Profile, entry: SwarmEntry) -> Mapping[PeerId, int]:
    """Return the Unix time at which each member that ever ran was last there.

    It is when this machine reached it, or when it last signed where it listens; whoever is
    missing never ran, as far as this machine knows.
    """
    known = profile.load_known_peers(entry.swarm_id)
    seen = {PeerId(peer.peer): peer.reached_at for peer in known}
    for hint in await _fetch_hints(profile, entry):
        seen[hint.peer] = max(hint.issued_at, seen.get(hint.peer, 0))
    return seen


async def _fetch_hints(profile: Profile, entry: SwarmEntry) -> list[AddressHint]:
    swarm_id = SwarmId(bytes.fromhex(entry.swarm_id))
    client = open_backend(entry.backend_url, profile, deadline_s=HINTS_S)
    try:
        data = await client.fetch_hints(swarm_id)
    except PalsError:
        return []  # the list of members said already that the backend is away
    return open_usable_hints(data, swarm_id=swarm_id, now_unix=time.time())
