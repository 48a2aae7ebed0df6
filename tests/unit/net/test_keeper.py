"""Keepers on a virtual network and clock, with backends that lie, freeze or are away."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from pals.net import keeper as keeper_module
from pals.net import membership
from pals.net.keeper import cut_when_expired
from pals.net.membership import load_saved
from pals.net.polling import MAX_BACKOFF_S
from pals.swarm.allowlist import AllowList
from pals.swarm.freshness import sign_freshness
from pals.swarm.records import digest
from pals.swarm.roster import Roster
from tests.unit.net.keepers import (
    BACKEND,
    Clock,
    FakeNetwork,
    Machine,
    open_network,
)
from tests.unit.swarm.chains import Chain, identity

P, Q = identity(3), identity(4)
NEW_SECRET = digest(b"the next secret")
STALE_S = 1200.0
DAY_S = 24 * 3600.0

pytestmark = pytest.mark.trio


@pytest.fixture
async def network(clock: Clock, tmp_path: Path) -> AsyncIterator[FakeNetwork]:
    async with open_network(clock, tmp_path, max_stale_s=STALE_S) as network:
        yield network


@pytest.fixture
def seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the profile seldom, where a test lasts for days."""
    monkeypatch.setattr(keeper_module, "WATCH_S", 60.0)


@pytest.fixture
async def member(seldom: None, network: FakeNetwork) -> Machine:
    """One member that knows of another one, which does not run."""
    network.chain.add_peer(P)
    network.chain.add_peer(Q)
    return network.add(Q)


def state(machine: Machine) -> str:
    return machine.allow_list.state(trio.current_time())


def alarms(machine: Machine) -> set[str]:
    return set(machine.ledger.alarms)


# --- polling -------------------------------------------------------------------------


async def test_a_list_with_new_words_stays_fresh(
    autojump_clock: MockClock, network: FakeNetwork, member: Machine
) -> None:
    await trio.sleep(600)
    assert (state(member), alarms(member)) == ("fresh", set())
    asked = network.backend.asked_at
    gaps = [b - a for a, b in pairwise(asked)]
    assert all(24 <= gap <= 30.1 for gap in gaps)
    assert len({round(gap, 2) for gap in gaps}) > 10
    assert network.backend.etags[0] == ""
    assert "" not in network.backend.etags[1:]


async def test_a_poll_without_a_word_renews_nothing(
    autojump_clock: MockClock, network: FakeNetwork, member: Machine
) -> None:
    network.backend.gives_word = False
    await trio.sleep(200)
    assert (state(member), alarms(member)) == ("stale", {"freeze"})
    await trio.sleep(STALE_S)
    assert state(member) == "expired"
    assert not member.allows(P.peer_id)
    network.backend.gives_word = True
    await trio.sleep(31)
    assert (state(member), alarms(member)) == ("fresh", set())


async def test_removed_and_added_peers_are_followed_and_saved(
    autojump_clock: MockClock, network: FakeNetwork, member: Machine
) -> None:
    joined = network.chain.roster().live[P.peer_id].joined
    network.chain.append(network.chain.remove(P, joined=joined))
    network.chain.add_peer(identity(9))
    await trio.sleep(31)
    assert set(member.cut) == {P.peer_id}
    assert member.allows(identity(9).peer_id)
    assert not member.allows(P.peer_id)
    saved = load_saved(member.profile, network.chain.swarm_id)
    assert saved is not None
    assert saved.held.entries == tuple(network.chain.entries)


async def test_an_unreachable_backend_lets_the_list_age_and_is_asked_again_soon(
    autojump_clock: MockClock, network: FakeNetwork, member: Machine
) -> None:
    network.backend.go_away()
    await trio.sleep(600)
    assert (state(member), alarms(member)) == ("stale", set())
    assert member.allows(P.peer_id)
    network.backend.error = None
    await trio.sleep(MAX_BACKOFF_S + 0.1)
    assert state(member) == "fresh"
    asked = network.backend.asked_at
    gaps = [b - a for a, b in pairwise(asked)]
    assert gaps[0] < 3
    assert max(gaps) <= MAX_BACKOFF_S + 0.1


async def test_a_dead_backend_ends_with_nobody_allowed(
    autojump_clock: MockClock, network: FakeNetwork, member: Machine
) -> None:
    network.backend.go_away()
    await trio.sleep(STALE_S - 60)
    assert member.allows(P.peer_id)
    await trio.sleep(120)
    assert not member.allows(P.peer_id)
    assert member.allow_list.members(trio.current_time()) == frozenset()


def rolled_back(chain: Chain) -> list[bytes]:
    return chain.entries[:2]


def forked(chain: Chain) -> list[bytes]:
    fork = Chain(entries=chain.entries[:2])
    fork.add_peer(identity(5))
    return fork.entries


def forged(chain: Chain) -> list[bytes]:
    return [*chain.entries, chain.entry(chain.certificate(chain.invite(), signer=Q))]


def emptied(chain: Chain) -> list[bytes]:
    return [*chain.entries, b""]


@pytest.mark.parametrize(
    ("lie", "alarm"),
    [(rolled_back, {"rollback"}), (forked, {"fork"}), (forged, set()), (emptied, set())],
)
async def test_a_lying_backend_changes_nothing_and_is_noticed(
    autojump_clock: trio.testing.MockClock,
    network: FakeNetwork,
    member: Machine,
    lie: Callable[[Chain], list[bytes]],
    alarm: set[str],
) -> None:
    await trio.sleep(31)
    network.backend.lie = lie(network.chain)
    await trio.sleep(600)
    assert (state(member), alarms(member)) == ("stale", alarm)
    assert member.allow_list.members(trio.current_time()) == network.chain.roster().members
    assert member.cut == {}
    saved = load_saved(member.profile, network.chain.swarm_id)
    assert saved is not None
    assert saved.roster.seq == network.chain.roster().seq


async def test_a_word_that_is_played_again_renews_nothing(
    autojump_clock: MockClock, network: FakeNetwork, member: Machine, clock: Clock
) -> None:
    old = sign_freshness(BACKEND, network.chain.roster(), at=int(clock.time()) + 5)
    await trio.sleep(5)
    network.backend.word = old
    await trio.sleep(600)
    clock.offset_s = -600  # the wall clock says that the word is new
    await trio.sleep(60)
    assert state(member) == "stale"
    await trio.sleep(STALE_S)
    assert not member.allows(P.peer_id)


@pytest.mark.parametrize("days", [-40, 40])
async def test_a_wall_clock_that_is_wrong_never_widens_access(
    autojump_clock: trio.testing.MockClock,
    network: FakeNetwork,
    member: Machine,
    clock: Clock,
    days: int,
) -> None:
    backend = network.backend
    backend.clock = Clock()
    clock.offset_s = days * DAY_S
    await trio.sleep(200)
    assert state(member) == "stale"
    await trio.sleep(STALE_S)
    assert state(member) == "expired"
    clock.offset_s = 0.0
    await trio.sleep(31)
    assert state(member) == "fresh"


async def test_a_list_is_verified_off_the_thread_that_serves(
    autojump_clock: trio.testing.MockClock,
    network: FakeNetwork,
    member: Machine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: list[threading.Thread] = []

    async def run(function: Callable[..., Roster], *args: object) -> Roster:
        made = threading.Thread(target=lambda: threads.append(threading.current_thread()))
        made.start()
        made.join()
        return function(*args)

    monkeypatch.setattr(trio.to_thread, "run_sync", run)
    await trio.sleep(31)
    assert threads
    assert threading.current_thread() not in threads


async def test_a_full_disk_does_not_stop_a_removal(
    autojump_clock: trio.testing.MockClock,
    network: FakeNetwork,
    member: Machine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(membership, "write_private", fail)
    network.kick(P, 1, NEW_SECRET)
    await trio.sleep(100)
    assert not member.allows(P.peer_id)
    assert set(member.cut) == {P.peer_id}


async def test_an_expired_list_cuts_everybody_after_the_drain_until_it_is_renewed(
    autojump_clock: MockClock, network: FakeNetwork, nursery: trio.Nursery
) -> None:
    cuts: list[float] = []
    allow_list, roster = AllowList(max_stale_s=300), network.chain.roster()
    allow_list.update(roster, trio.current_time(), age_s=0)
    expires_at = trio.current_time() + 300
    nursery.start_soon(cut_when_expired, allow_list, lambda: cuts.append(trio.current_time()))
    await trio.sleep_until(expires_at + 1)
    assert not allow_list.allows(network.chain.founder.peer_id, trio.current_time())
    await trio.sleep_until(expires_at + keeper_module.DRAIN_S - 1)
    assert cuts == []
    drained_at = expires_at + keeper_module.DRAIN_S
    await trio.sleep_until(drained_at + 3 * keeper_module.EXPIRY_INTERVAL_S)
    assert len(cuts) >= 2
    allow_list.update(roster, trio.current_time(), age_s=0)
    before = len(cuts)
    await trio.sleep(200)
    assert len(cuts) == before
