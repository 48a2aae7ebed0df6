"""`pals status`: where this machine stands in its swarms, and what to do next."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import trio

from pals import config
from pals.cli import console
from pals.cli.formats import format_age
from pals.cli.options import ConfigDir, Json, SwarmName
from pals.cli.swarm import describe
from pals.config import Profile, SwarmEntry
from pals.errors import NoSwarm

if TYPE_CHECKING:
    from pals.net.standing import Standing


async def status(
    *, swarm: SwarmName = None, config_dir: ConfigDir = None, json: Json = False
) -> None:
    """Show the profile's swarms: role, members, how old the list is, what to do next.

    Args:
        swarm: Name or id of one swarm; all of them when left out.
        config_dir: Profile folder.
        json: Print one JSON document on standard output.
    """
    profile = Profile(config.config_dir(config_dir))
    swarms = profile.load_swarms() if swarm is None else [profile.load_swarm(swarm)]
    if not swarms:
        raise NoSwarm(path=profile.path)
    found = await _look_at_all(profile, swarms)
    if json:
        console.json({"schema": 1, "swarms": [describe(standing) for standing in found]})
        return
    headers = ("swarm", "role", "members", "epoch", "list", "age")
    console.table(headers, [_row(standing) for standing in found])
    for standing in found:
        for alarm in standing.alarms:
            console.warn(f"{standing.entry.name}: {alarm}")
    for standing in found:
        if standing.next_step:
            console.note(f"{standing.entry.name}: {standing.next_step}")


async def _look_at_all(profile: Profile, swarms: list[SwarmEntry]) -> list[Standing]:
    """Ask all backends at the same time, each within its deadline."""
    from pals.net.standing import look_at

    found: dict[str, Standing] = {}

    async def look(entry: SwarmEntry) -> None:
        found[entry.swarm_id] = await look_at(profile, entry)

    async with trio.open_nursery() as nursery:
        for entry in swarms:
            nursery.start_soon(partial(look, entry))
    return [found[entry.swarm_id] for entry in swarms]


def _row(standing: Standing) -> tuple[object, ...]:
    shown = describe(standing)
    members = "?" if shown["members"] is None else shown["members"]
    return (
        standing.entry.name,
        standing.part,
        members,
        shown["epoch"],
        standing.state,
        format_age(standing.age_s),
    )
