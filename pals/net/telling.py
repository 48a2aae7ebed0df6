"""Telling the swarm at once what a command changed: a removal, a new secret, an invite."""

from __future__ import annotations

from dataclasses import dataclass

import trio

from pals.config import Profile, SwarmEntry, SwarmSecret
from pals.errors import ProfileInUse
from pals.net.node import Node, NodeOptions, open_node
from pals.settings import NodeSettings
from pals.swarm.identity import load_or_create_identity

TELL_S = 10.0
MEET_S = 3.0
START_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """Who knows of a change.

    Attributes:
        is_running: Whether a node runs with the profile, which tells the others by itself.
        told: Members that have the new list and the new secret; 0 while a node runs.
        connected: Members that could be reached.
    """

    is_running: bool
    told: int = 0
    connected: int = 0


async def announce_change(
    profile: Profile, entry: SwarmEntry, settings: NodeSettings, *, deadline_s: float = TELL_S
) -> Told:
    """Let connected members know of what this profile's files say now.

    A node that runs with the profile watches its files and does so. If none runs, one is
    opened until every member that it reaches has asked for the list and the secret. Whoever
    is not reached learns of it from the backend, or from any other member.

    Args:
        profile: Whose list, removals and secret were changed.
        entry: The swarm, with its new secret.
        settings: Where to listen, and whom to meet.
        deadline_s: Seconds for the members to ask.

    Raises:
        RosterUnavailable: Nobody with authority called the profile's list the newest lately.
        NotAMember: This machine is not on the list.
        PortInUse: The listening address is taken.
    """
    try:
        with profile.lock():
            return await _tell(profile, entry, settings, deadline_s)
    except ProfileInUse:
        return Told(is_running=True)


async def _tell(
    profile: Profile, entry: SwarmEntry, settings: NodeSettings, deadline_s: float
) -> Told:
    options = NodeOptions(
        profile=profile,
        entry=entry,
        secret=SwarmSecret.parse(entry.swarm_secret),
        identity=load_or_create_identity(profile),
        settings=settings,
    )
    with trio.move_on_after(START_S + deadline_s):
        async with open_node(options) as node:
            with trio.move_on_after(deadline_s):
                if await _meet_anybody(node):
                    await node.keeper.tell_all()
            told, connected = node.keeper.told(), node.host.connected_peers()
            return Told(is_running=False, told=len(told), connected=len(connected))
    return Told(is_running=False)


async def _meet_anybody(node: Node) -> bool:
    """Wait a moment for the first member; return whether there is one."""
    met = trio.Event()
    node.host.on_connect(lambda _: met.set())
    if not node.host.connected_peers() and len(node.members()) > 1:
        with trio.move_on_after(MEET_S):
            await met.wait()
    return bool(node.host.connected_peers())
