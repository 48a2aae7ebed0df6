from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from pals.net.nat import upnp
from pals.net.nat.addresses import Endpoint
from pals.net.nat.upnp import LEASE_S, NoForward, PortForward

PUBLIC = "203.0.113.7"


class FakeRouter:
    """Answers as told, and remembers what it forwards."""

    def __init__(self, ip: str = PUBLIC, *, taken: tuple[int, ...] = (), endless: bool = False):
        self.ip, self.taken, self.endless = ip, taken, endless
        self.forwards: dict[int, tuple[int, int]] = {}
        self.calls = 0

    def find(self) -> str:
        if not self.ip:
            raise NoForward("No UPnP device discovered")
        return self.ip

    def forward(self, external_port: int, port: int, lease_s: int) -> None:
        self.calls += 1
        if external_port in self.taken:
            raise NoForward("ConflictInMappingEntry")
        if self.endless and lease_s:
            raise NoForward("OnlyPermanentLeasesSupported")
        self.forwards[external_port] = (port, lease_s)

    def remove(self, external_port: int) -> None:
        del self.forwards[external_port]


@pytest.fixture(autouse=True)
def threadless(monkeypatch):
    """Call the fake at once: a thread would let the test's clock jump ahead."""

    async def run_sync(function, *arguments, abandon_on_cancel):
        await trio.lowlevel.checkpoint()
        return function(*arguments)

    monkeypatch.setattr(upnp.trio.to_thread, "run_sync", run_sync)


async def run_for(seconds, router, *, port=4001):
    told: list[Endpoint | None] = []
    forward = PortForward(port, lambda: router, told.append, random.Random(0))
    with trio.move_on_after(seconds):
        await forward.run()
    return told


@pytest.mark.trio
async def test_the_listening_port_is_forwarded_and_given_back(autojump_clock):
    router = FakeRouter()

    async def look():
        await trio.sleep(1)
        assert router.forwards == {4001: (4001, LEASE_S)}

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        assert await run_for(10, router) == [Endpoint(PUBLIC, 4001)]
    assert router.forwards == {}


@pytest.mark.trio
async def test_the_lease_is_renewed_well_before_it_ends(autojump_clock):
    router = FakeRouter()

    told = await run_for(2 * LEASE_S, router)

    assert told == [Endpoint(PUBLIC, 4001)]
    assert router.calls >= 2 * 2


@pytest.mark.trio
async def test_another_port_is_taken_where_the_first_is_in_use(autojump_clock):
    told = await run_for(10, FakeRouter(taken=(4001,)))

    assert len(told) == 1
    assert told[0].port != 4001


@pytest.mark.trio
async def test_a_router_that_knows_no_leases_forwards_without_end(autojump_clock):
    router = FakeRouter(endless=True)
    router.remove = lambda port: None

    await run_for(10, router)

    assert router.forwards == {4001: (4001, 0)}


@pytest.mark.trio
@pytest.mark.parametrize("ip", ["", "192.168.1.2", "100.64.0.9", "junk", "0.0.0.0"])
async def test_nothing_is_told_without_a_router_that_is_on_the_public_network(ip, autojump_clock):
    router = FakeRouter(ip)

    assert await run_for(10, router) == []
    assert router.forwards == {}


@pytest.mark.trio
async def test_a_router_that_forgets_how_is_told_of_and_tried_again(autojump_clock):
    router = FakeRouter()

    async def break_and_mend():
        await trio.sleep(1)
        router.ip = ""
        await trio.sleep(upnp.RENEW_S)
        router.ip = PUBLIC

    async with trio.open_nursery() as nursery:
        nursery.start_soon(break_and_mend)
        told = await run_for(upnp.RENEW_S + upnp.RETRY_S + 10, router)
    assert told == [Endpoint(PUBLIC, 4001), None, Endpoint(PUBLIC, 4001)]


@pytest.mark.trio
async def test_a_port_that_stays_with_the_router_is_not_an_error(autojump_clock):
    router = FakeRouter()

    def fail(_):
        raise NoForward("gone")

    router.remove = fail

    await run_for(10, router)
