"""M5 with the system's clock off by 40 days, and with a backend that never answers.

The commands run as processes whose every clock is another, from before their first import.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio
from litestar.types import ASGIApp, Receive, Scope, Send

from pals.backend.database import sqlite_url
from pals.backend.service import BackendService
from pals.config import Profile, SwarmSecret
from pals.errors import PeerUnreachable
from pals.net.enrolment import create_invite, create_swarm, look_up, redeem_invite
from pals.net.node import Node, NodeOptions, open_node
from pals.net.report import ListReport
from pals.net.report_socket import ask_list
from pals.settings import NodeSettings
from pals.swarm.identity import load_or_create_identity
from tests.attacks.clocks import DAY_S, SystemClock
from tests.attacks.forks import Forks, Order, open_forks
from tests.checkpoints import make_llama_checkpoint
from tests.integration.backends import running_backend
from tests.integration.processes import Pals, Running, assert_refused
from tests.integration.test_membership import answering

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the clock is one of Linux")

NOW = 1e9
GONE = "http://127.0.0.1:1"
NOWHERE = "/ip4/300.1.1.1/tcp/1"
"""No machine listens there: a command that names it has got past its member list."""
HOUR_S = 3600.0
ANSWER_S = 20.0
"""A command waits 10 s for a backend, and is to give up then."""
SOON_S = 60.0
"""Two polls, the first of which may have begun before what a test changed."""
PAUSE_S = 31.0
"""Longer than any pause between two polls."""


LIES = {
    "fails": (500, b"{}"),
    "talks garbage": (200, b"\xff garbage"),
    "shows an empty list": (200, b'{"entries":[]}'),
}


class Switch:
    """Spoils a backend: it is silent, which takes every request and answers none, or lies."""

    def __init__(self) -> None:
        self.is_silent = False
        self.lie: tuple[int, bytes] | None = None

    def wrap(self, app: ASGIApp) -> ASGIApp:
        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            while scope["type"] == "http" and self.is_silent:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            if scope["type"] == "http" and self.lie is not None:
                await answering(*self.lie)(scope, receive, send)
            else:
                await app(scope, receive, send)

        return answer


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A swarm with a backend that can be silenced, and commands with clocks of their own."""

    folder: Path
    operator: Profile
    switch: Switch
    clock: SystemClock
    pals: Pals

    def join(self) -> Profile:
        """Return the profile of a new member, which has seen that its list is the newest."""
        profile = Profile(self.folder / f"member-{len(list(self.folder.iterdir()))}")
        trio.run(redeem_invite, profile, trio.run(partial(create_invite, self.operator, now=NOW)))
        trio.run(look_up, profile)
        return profile


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder, switch = tmp_path_factory.mktemp("clocks"), Switch()
    operator, model = Profile(folder / "operator"), make_llama_checkpoint(folder / "tiny")
    clock = SystemClock(folder / "clock")
    pals = Pals(
        {
            "HF_HOME": str(folder / "hub"),
            "HF_HUB_OFFLINE": "1",
            "NO_COLOR": "1",
            "PALS_CACHE_DIR": str(folder / "cache"),
            **clock.variables,
        }
    )
    service = BackendService(sqlite_url(folder / "backend" / "backend.db"))
    with running_backend(service, wrap=switch.wrap) as url:
        create = partial(create_swarm, name="test", model=str(model), backend_url=url, now=NOW)
        trio.run(create, operator)
        yield World(folder=folder, operator=operator, switch=switch, clock=clock, pals=pals)
        switch.is_silent = False
    service.close()


@pytest.fixture(scope="module")
def forks(world: World) -> Iterator[Forks]:
    with open_forks(world.pals, world.folder) as forks:
        yield forks


@pytest.fixture(autouse=True)
def right_again(world: World) -> Iterator[None]:
    yield
    world.switch.is_silent, world.switch.lie = False, None
    world.clock.set_wall(0.0)


# --- at the start -----------------------------------------------------------------------------

SLOW = pytest.mark.slow
CLOCK = "check this machine's clock"
SAVED = "using the last verified member list"
STARTS = [
    # the backend, seconds by which the clock is off, the state of the list, what is said of it
    ("answers", 0.0, "fresh", ""),
    ("answers", 40 * DAY_S, "expired", "nobody with authority said lately"),
    ("answers", -40 * DAY_S, "expired", "nobody with authority said lately"),
    ("gone", 0.0, "fresh", SAVED),
    ("gone", 100.0, "stale", SAVED),
    ("gone", 23 * HOUR_S, "stale", SAVED),
    ("gone", 25 * HOUR_S, "expired", "was the newest 25 h ago"),
    ("gone", 40 * DAY_S, "expired", "was the newest 960 h ago"),
    ("gone", -40 * DAY_S, "expired", "nothing shows how old"),
    *((lie, 0.0, "fresh", SAVED) for lie in LIES),
    *((lie, 25 * HOUR_S, "expired", "was the newest 25 h ago") for lie in LIES),
    ("gone, and no list was saved", 0.0, "none", "did not answer"),
    pytest.param("silent", 40 * DAY_S, "expired", "no answer within", marks=SLOW),
    pytest.param("silent", 0.0, "fresh", "no answer within", marks=SLOW),
    pytest.param("silent", HOUR_S, "stale", "no answer within", marks=SLOW),
    pytest.param("silent", -40 * DAY_S, "expired", "no answer within", marks=SLOW),
    pytest.param("silent, and no list was saved", 0.0, "none", "no answer within", marks=SLOW),
]


@pytest.mark.parametrize(("backend", "offset_s", "state", "said"), STARTS)
def test_m5_a_command_starts_with_a_list_that_is_in_force_and_with_no_other(
    world: World, forks: Forks, backend: str, offset_s: float, state: str, said: str
) -> None:
    one, other = world.join(), world.join()
    for profile in (one, other):
        spoil(profile, backend)
    world.switch.is_silent, world.switch.lie = backend.startswith("silent"), LIES.get(backend)
    world.clock.set_wall(offset_s)

    status, shard, serve = forks.run_all(
        [
            ordered(one, "status", "--json"),
            ordered(one, "shard", "--layers", "0:1", "--listen", NOWHERE),
            ordered(other, "serve", "--port", "0", "--listen", NOWHERE),
        ]
    )

    assert serve.took_s < ANSWER_S
    (shown,) = json.loads(status.out)["swarms"]
    assert shown["list"] == state
    for done in (shard, serve):
        assert said in done.err
        if state in ("fresh", "stale"):
            assert_refused(done, 2, NOWHERE)
        else:
            assert_refused(done, 3, "no verified member list", CLOCK, "nothing is served without")
            assert "members refuse each other" in shown["next"]
    if (backend, state) == ("answers", "expired"):
        assert "clock" in shown["next"]


def spoil(profile: Profile, backend: str) -> None:
    """Do to a member's profile what a case says of its backend and its list."""
    entry = profile.load_swarm()
    if backend.startswith("gone"):
        profile.save_swarm(msgspec.structs.replace(entry, backend_url=GONE))
    if backend.endswith("no list was saved"):
        profile.roster_path(entry.swarm_id).unlink()


def ordered(profile: Profile, *arguments: str) -> Order:
    """Return a command of a profile, with its secret where a server looks for it."""
    secret = profile.load_swarm().swarm_secret
    variables = {"PALS_CONFIG_DIR": str(profile.path), "PALS_SWARM_SECRET": secret}
    return Order(arguments=arguments, variables=variables)


# --- while running ----------------------------------------------------------------------------


@dataclass(slots=True)
class Neighbour:
    """Another member, whose clock is right, and which dials the one in question."""

    node: Node
    profile: Profile
    address: str

    async def can_connect(self) -> bool:
        host, peer = self.node.host, load_or_create_identity(self.profile).peer_id
        await host.drop_peer(peer)
        try:
            await host.connect(peer, [self.address])
        except PeerUnreachable:
            return False
        return True

    async def has_state(self, state: str) -> ListReport:
        """Return how the list of the other stands once it is in a state."""
        with trio.fail_after(SOON_S):
            while True:
                report = await ask_list(self.profile.path)
                if report is not None and report.state == state:
                    return report
                await trio.sleep(0.1)


@asynccontextmanager
async def served(world: World, profile: Profile) -> AsyncIterator[tuple[Running, Neighbour]]:
    """Run `pals serve` with a profile, and the operator's node in this process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen = f"/ip4/127.0.0.1/tcp/{free.getsockname()[1]}"
    command = ("serve", "--port", "0", "--listen", listen, "--no-upnp", "--json")
    at = {"PALS_CONFIG_DIR": str(profile.path)}
    with world.pals.start(*command, **at) as server:
        await trio.to_thread.run_sync(server.wait_for_event, "ready")
        async with open_node(node_options(world.operator)) as node:
            yield server, Neighbour(node, profile, listen)


def node_options(profile: Profile) -> NodeOptions:
    entry = profile.load_swarm()
    return NodeOptions(
        profile=profile,
        entry=entry,
        secret=SwarmSecret.parse(entry.swarm_secret),
        identity=load_or_create_identity(profile),
        settings=NodeSettings(listen="/ip4/127.0.0.1/tcp/0", upnp=False),
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("days", [-40, 0, 40])
def test_m5_a_running_member_goes_from_fresh_to_expired_and_comes_back_by_itself(
    world: World, days: int
) -> None:
    trio.run(run_through_all_states, world, world.join(), days)


async def run_through_all_states(world: World, profile: Profile, days: int) -> None:
    clock, switch = world.clock, world.switch
    async with served(world, profile) as (server, neighbour):
        await neighbour.has_state("fresh")
        assert await neighbour.can_connect()

        switch.is_silent = True
        clock.set_wall(days * DAY_S)
        await neighbour.has_state("fresh")
        assert await neighbour.can_connect()

        clock.pass_time(100.0)
        await neighbour.has_state("stale")
        assert await neighbour.can_connect()
        note = partial(server.wait_for_note, "could not be renewed")
        assert "no answer within" in await trio.to_thread.run_sync(note)

        clock.pass_time(DAY_S)
        await neighbour.has_state("expired")
        await trio.to_thread.run_sync(server.wait_for_note, "the member list expired")
        assert not await neighbour.can_connect()
        shown = await trio.to_thread.run_sync(partial(status_of, world, profile))
        assert shown["list"] == "expired"
        assert shown["next"]

        switch.is_silent = False
        if days:
            assert "clock" in await alarm_of(clock, neighbour)
            assert not await neighbour.can_connect()
        clock.set_wall(0.0)
        clock.pass_time(PAUSE_S)
        await neighbour.has_state("fresh")
        assert await neighbour.can_connect()


async def alarm_of(clock: SystemClock, neighbour: Neighbour) -> str:
    """Return what a running member reports once the backend has answered it."""
    clock.pass_time(PAUSE_S)
    with trio.fail_after(SOON_S):
        while not (report := await neighbour.has_state("expired")).alarms:  # noqa: ASYNC110
            await trio.sleep(0.1)
    return " ".join(report.alarms)


def status_of(world: World, profile: Profile) -> dict[str, object]:
    done = world.pals.run("status", "--json", PALS_CONFIG_DIR=str(profile.path))
    assert done.status == 0, done.err
    (shown,) = json.loads(done.out)["swarms"]
    return shown
