"""The swarm of the ring benchmark: members that are reached where the benchmark says."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from multiaddr import Multiaddr

from pals.cli.children import open_children
from pals.config import Profile, SwarmSecret
from pals.net import _libp2p
from pals.net.enrolment import create_invite, create_swarm, redeem_invite
from pals.net.node import NodeOptions
from pals.settings import NodeSettings
from pals.swarm.identity import load_or_create_identity

START_DEADLINE_S = 60.0


@asynccontextmanager
async def open_membership(model: str, count: int) -> AsyncGenerator[list[Profile]]:
    """Run a backend; give the operator's profile and those of ``count`` invited peers."""
    with tempfile.TemporaryDirectory(prefix="pals-ring-") as name:
        folder = Path(name)
        async with open_children() as children:
            backend = await children.start(
                "the backend",
                *("backend", "--port", "0", "--data", str(folder / "backend.sqlite")),
                config_dir=folder / "backend",
            )
            ready = await backend.wait_for_event("ready", deadline_s=START_DEADLINE_S)
            operator = Profile(folder / "operator")
            url = str(ready["url"])
            await create_swarm(operator, name="ring", model=model, backend_url=url, now=time.time())
            peers = [Profile(folder / f"peer-{i}") for i in range(count)]
            for peer in peers:
                await redeem_invite(peer, await create_invite(operator, now=time.time()))
            yield [operator, *peers]


def node_options(profile: Profile, *, port: int, announced_port: int) -> NodeOptions:
    """Return the options of a member that listens on one port and is dialled at another."""
    entry = profile.load_swarm()
    announced = Multiaddr(f"/ip4/127.0.0.1/tcp/{announced_port}")
    _libp2p.expand_wildcards = lambda _: [announced]
    return NodeOptions(
        profile=profile,
        entry=entry,
        secret=SwarmSecret.parse(entry.swarm_secret),
        identity=load_or_create_identity(profile),
        settings=NodeSettings(listen=f"/ip4/127.0.0.1/tcp/{port}"),
    )


def free_port() -> int:
    """Return a port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
