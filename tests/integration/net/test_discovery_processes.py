"""Eight processes: how soon a route is known, a new shard is used and a dead one is gone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.integration.net.harness import until

ROOT = Path(__file__).parents[3]
ROUTE_S = 1.0
NEW_SHARD_S = 2.0
GONE_S = 5.0
START_S = 60.0

pytestmark = [pytest.mark.trio, pytest.mark.slow, pytest.mark.timeout(180)]


class Process:
    """One member in a process of its own, and everything that it has told."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.told: list[dict] = []

    async def listen(self) -> None:
        rest = b""
        async with self.process.stdout as stdout:
            async for data in stdout:
                *lines, rest = (rest + data).split(b"\n")
                self.told += [json.loads(line) for line in lines]

    def first(self, event: str, matches: Callable[[dict], bool] = lambda _: True) -> dict | None:
        return next((t for t in self.told if t["event"] == event and matches(t)), None)

    def last_table(self) -> dict:
        return next((t for t in reversed(self.told) if t["event"] == "table"), {"peers": []})

    def sees(self, peer: str) -> bool:
        return peer in self.last_table()["peers"]

    async def until_told(self, event: str, matches: Callable[[dict], bool] = lambda _: True):
        await until(lambda: self.first(event, matches) is not None, deadline_s=START_S)
        return self.first(event, matches)


class Swarm:
    """Starts members, which know the first one or whom they are told."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.running: list[Process] = []

    async def start(self, layers: str, *known: str) -> Process:
        number = str(len(self.running) + 1)
        command = [sys.executable, "-m", "tests.integration.net.member_process"]
        opened = await trio.lowlevel.open_process(
            [*command, number, layers, *known], stdout=subprocess.PIPE, cwd=ROOT
        )
        member = Process(opened)
        self.running.append(member)
        self.nursery.start_soon(member.listen)
        return member

    async def kill_all(self) -> None:
        with trio.CancelScope(shield=True):
            for member in self.running:
                if member.process.returncode is None:
                    member.process.kill()
                await member.process.wait()
            self.nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_swarm() -> AsyncIterator[Swarm]:
    async with trio.open_nursery() as nursery:
        swarm = Swarm(nursery)
        try:
            yield swarm
        finally:
            await swarm.kill_all()


async def test_bars_of_eight_processes() -> None:
    async with open_swarm() as swarm:
        idle = await swarm.start("-")
        known = (await idle.until_told("connected"))["addresses"][0]
        for layers in ("0:10", "10:20", "20:30", "0:15", "15:30"):
            await swarm.start(layers, known)
        for member in swarm.running[1:]:
            await member.until_told("ready")
        await until(lambda: len(idle.last_table()["peers"]) == 5, deadline_s=START_S)

        driver = await swarm.start("-", known)
        connected = await driver.until_told("connected")
        route = await driver.until_told("table", lambda t: t["chain"])
        assert route["at"] - connected["at"] <= ROUTE_S

        newcomer = await swarm.start("0:30", known)
        ready = await newcomer.until_told("ready")
        peer = newcomer.first("connected")["peer"]
        used = await driver.until_told("table", lambda t: peer in t["peers"])
        assert used["at"] - ready["at"] <= NEW_SHARD_S

        others = [member for member in swarm.running if member is not newcomer]
        await until(lambda: all(member.sees(peer) for member in others), deadline_s=START_S)
        newcomer.process.kill()
        await until(lambda: not any(m.sees(peer) for m in others), deadline_s=START_S)
        noticed = [t for m in others if (t := m.first("lost", lambda t: t["peer"] == peer))]
        gone_at = max(member.last_table()["at"] for member in others)
        assert gone_at - min(t["at"] for t in noticed) <= GONE_S
        for member in others:
            assert len(member.last_table()["peers"]) == 5
