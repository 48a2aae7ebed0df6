"""Runs the backend inside its operator's profile, so that a swarm needs no server.

The node that runs with the profile keeps its database open, answers members on its own host
and strangers at a door beside it.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from pals.config import Profile
from pals.net.backend import OnChange
from pals.net.backend_members import MembersBackend
from pals.net.door import Door, DoorLimits
from pals.net.hosted import load_door_identity, save_door_addresses
from pals.net.redemption import open_redemption
from pals.swarm.calls import Joined, RedeemCall
from pals.swarm.identity import Identity
from pals.types import SwarmId

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from pals.backend.limiter import BackendLimiter
    from pals.backend.service import BackendService
    from pals.net.host import Host


@dataclass(frozen=True, slots=True)
class ServiceRedeemer:
    """Admits strangers to whatever swarms a service keeps, a few in a minute."""

    service: BackendService
    limiter: BackendLimiter

    def redeem(self, call: RedeemCall, source: str) -> Joined:
        """Admit one; see `pals.net.redemption.Redeemer`."""
        swarm_id = SwarmId(call.swarm_id)
        self.limiter.redeem(source, swarm_id)
        entry = self.service.redeem(swarm_id, call.auth, call.join)
        listed = self.service.entries(swarm_id)
        assert listed.entries is not None
        return Joined(
            entry=entry,
            entries=listed.entries,
            freshness=listed.freshness,
            hints=self.service.hints(swarm_id),
        )


@asynccontextmanager
async def open_service_door(
    service: BackendService,
    identity: Identity,
    *,
    listen: str,
    limiter: BackendLimiter | None = None,
    on_join: OnChange | None = None,
    limits: DoorLimits | None = None,
) -> AsyncGenerator[Door]:
    """Let strangers join the swarms of a service; errors and the rest as `open_redemption`.

    Args:
        service: What they join.
        identity: The door's.
        listen: Multiaddr to listen on.
        limiter: The one of the other transports of the service.
        on_join: Called when somebody joined, before it hears of it.
        limits: What is spent on strangers.
    """
    from pals.backend.limiter import BackendLimiter

    redeemer = ServiceRedeemer(service, limiter or BackendLimiter())
    opening = open_redemption(
        identity, listen=listen, redeemer=redeemer, on_join=on_join, limits=limits
    )
    async with opening as door:
        yield door


@asynccontextmanager
async def host_backend(
    service: BackendService,
    profile: Profile,
    host: Host,
    swarm_id: SwarmId,
    *,
    listen: str,
    on_change: OnChange,
) -> AsyncGenerator[Door]:
    """Serve a profile's backend to members on their host, and to strangers at a door.

    Args:
        service: The profile's own.
        profile: Keeps the door's identity, and the addresses for invites.
        host: Of the node that runs with the profile.
        swarm_id: Its swarm.
        listen: Multiaddr of the door.
        on_change: Lets the node follow at once, so that whom the backend admits gets in.

    Raises:
        InvalidConfig: ``listen`` is not a TCP multiaddr.
        PortInUse: The door's address is taken.
    """
    MembersBackend(host, service, swarm_id, on_change)
    identity = load_door_identity(profile.path)
    opening = open_service_door(service, identity, listen=listen, on_join=on_change)
    async with opening as door:
        save_door_addresses(profile, door.addresses())
        yield door


async def run_hosting(
    service: BackendService,
    profile: Profile,
    host: Host,
    swarm_id: SwarmId,
    *,
    listen: str,
    on_change: OnChange,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Do as `host_backend` for ever."""
    hosting = host_backend(service, profile, host, swarm_id, listen=listen, on_change=on_change)
    async with hosting as door:
        _log.info("machines join at %s", ", ".join(door.addresses()))
        task_status.started()
        await trio.sleep_forever()
