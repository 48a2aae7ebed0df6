"""M1 to M5: backends that are hacked, lie, freeze or are gone, and members that were kicked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
import trio
from trio.testing import MockClock

from pals.errors import BackendRefused, PeerUnreachable
from pals.net import exchange
from pals.net import keeper as keeper_module
from pals.net.membership import keep_list, load_saved
from pals.swarm.identity import Identity
from pals.swarm.invite import Invite
from pals.swarm.ledger import Held
from pals.swarm.records import digest
from tests.integration.net.harness import until as soon
from tests.integration.net.swarms import Member, is_meshed, open_swarm, seen_by
from tests.unit.net.keepers import BACKEND, Clock, FakeNetwork, Machine, open_network, until
from tests.unit.swarm.chains import Chain, identity, rechain, record_of

P, Q, EVIL, KICKED = identity(3), identity(4), identity(666), identity(5)
NEW_SECRET = digest(b"the next secret")
DAY_S = 24 * 3600.0

MAX_STALE_S = 300.0

pytestmark = pytest.mark.trio


@pytest.fixture
def seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the keepers look at clock and profile once a minute: hours pass in these tests."""
    monkeypatch.setattr(keeper_module, "WATCH_S", 60.0)
    monkeypatch.setattr(keeper_module, "TICK_S", 60.0)


@pytest.fixture
async def network(clock: Clock, tmp_path: Path) -> AsyncIterator[FakeNetwork]:
    async with open_network(clock, tmp_path) as network:
        yield network


@pytest.fixture
async def member(seldom: None, network: FakeNetwork) -> Machine:
    """One running member of a swarm of three."""
    network.chain.add_peer(P)
    network.chain.add_peer(Q)
    return network.add(Q)


def state(machine: Machine) -> str:
    return machine.allow_list.state(trio.current_time())


def alarms(machine: Machine) -> set[str]:
    return set(machine.ledger.alarms)


def admitted(machine: Machine) -> frozenset[str]:
    return machine.allow_list.members(trio.current_time())


# --- M1: a hacked backend adds nobody -----------------------------------------------------


def own_invite(chain: Chain) -> list[bytes]:
    """An invite that the backend signed itself, and a peer that came by it."""
    return appended(chain, chain.certificate(made := chain.invite(), signer=EVIL), made, EVIL)


def invite_by_appointed_backend(chain: Chain) -> list[bytes]:
    """The backend is an authority: to say that a list is new, and for nothing else."""
    return appended(chain, chain.certificate(made := chain.invite(), signer=BACKEND), made, BACKEND)


def invite_in_the_operator_s_name(chain: Chain) -> list[bytes]:
    made = chain.invite()
    forged = msgspec.msgpack.decode(chain.certificate(made, signer=EVIL))
    forged[-2] = chain.operator.public_key
    return appended(chain, msgspec.msgpack.encode(forged), made, EVIL)


def spent_invite(chain: Chain) -> list[bytes]:
    """Somebody who holds a spent invite comes by it once more."""
    again = Chain(entries=list(chain.entries))
    made = chain.invite()
    again.append(again.certificate(made, max_uses=1))
    again.append(again.join(made.signing_key, identity(8)))
    again.append(again.join(made.signing_key, EVIL))
    return again.entries


def stolen_identity(chain: Chain) -> list[bytes]:
    """A member's own invite admits an identity that did not sign."""
    again = Chain(entries=list(chain.entries))
    made = chain.invite()
    again.append(again.certificate(made))
    again.append(again.join(made.signing_key, EVIL, peer_signer=BACKEND))
    return again.entries


def other_genesis(chain: Chain) -> list[bytes]:
    """A whole chain of its own, honestly made."""
    other = Chain(operator=EVIL, founder=EVIL)
    other.add_peer(identity(8))
    return other.entries


def own_administrator(chain: Chain) -> list[bytes]:
    again = Chain(entries=list(chain.entries))
    again.append(again.appoint(Q.public_key, "admin", signer=BACKEND))
    made = again.invite()
    again.append(again.certificate(made, signer=Q))
    again.append(again.join(made.signing_key, EVIL))
    return again.entries


def appended(chain: Chain, certificate: bytes, made: Invite, peer: Identity) -> list[bytes]:
    again = Chain(entries=list(chain.entries))
    again.append(certificate)
    again.append(again.join(made.signing_key, peer))
    return again.entries


@pytest.mark.parametrize(
    "lie",
    [
        own_invite,
        invite_by_appointed_backend,
        invite_in_the_operator_s_name,
        spent_invite,
        stolen_identity,
        other_genesis,
        own_administrator,
    ],
)
async def test_m1_a_hacked_backend_adds_nobody(
    autojump_clock: MockClock,
    network: FakeNetwork,
    member: Machine,
    lie: Callable[[Chain], list[bytes]],
) -> None:
    honest = admitted(member)
    network.backend.lie = lie(network.chain)
    await trio.sleep(600)
    assert admitted(member) == honest
    assert not member.allows(EVIL.peer_id)
    saved = load_saved(member.profile, network.chain.swarm_id)
    assert saved is not None
    assert saved.roster.members == honest


async def test_m1_a_hacked_backend_removes_nobody_and_puts_nothing_in_another_order(
    autojump_clock: MockClock,
    network: FakeNetwork,
    member: Machine,
) -> None:
    honest = admitted(member)
    chain, joined = network.chain, network.chain.roster().live[P.peer_id].joined
    records = [record_of(entry) for entry in chain.entries]
    for lie in (
        [*chain.entries, chain.entry(chain.remove(P, joined=joined, signer=EVIL))],
        [*chain.entries, chain.entry(chain.leave(P, joined=joined, signer=EVIL))],
        rechain([records[0], *records[2:], records[1]]),
        rechain([*records[:2], *records[4:]]),
    ):
        network.backend.lie = lie
        await trio.sleep(100)
        assert admitted(member) == honest
        assert member.cut == {}


# --- M2: rollback, freeze, fork -----------------------------------------------------------


async def test_m2_an_older_list_is_noticed_and_changes_nothing(
    autojump_clock: MockClock,
    network: FakeNetwork,
    member: Machine,
) -> None:
    await trio.sleep(31)
    network.backend.lie = network.chain.entries[:3]
    await trio.sleep(100)
    assert "rollback" in alarms(member)
    assert admitted(member) == network.chain.roster().members


async def test_m2_a_list_that_never_advances_is_noticed_by_who_hears_of_a_later_one(
    autojump_clock: MockClock,
    network: FakeNetwork,
    member: Machine,
) -> None:
    """The backend freezes one member, which learns from another what it is not shown."""
    frozen = list(network.chain.entries)
    network.kick(P, 1, NEW_SECRET)
    founder = network.add(network.chain.founder, epoch=1, secret=NEW_SECRET)
    network.backend.lie = frozen
    network.connect(member, founder)
    await trio.sleep(60)
    assert not member.allows(P.peer_id)
    assert alarms(member) == {"freeze"}


async def test_m2_words_that_are_not_renewed_let_the_list_age_and_are_reported(
    autojump_clock: MockClock,
    network: FakeNetwork,
    member: Machine,
) -> None:
    network.backend.gives_word = False
    await trio.sleep(200)
    assert (state(member), alarms(member)) == ("stale", {"freeze"})


async def test_m2_two_members_that_are_shown_different_lists_notice(
    autojump_clock: MockClock,
    network: FakeNetwork,
    member: Machine,
) -> None:
    fork = Chain(entries=network.chain.entries[:2])
    fork.add_peer(identity(8))
    other = network.add(network.chain.founder, entries=fork.entries, has_word=False)
    network.backend.go_away()
    network.connect(member, other)
    await trio.sleep(60)
    assert "fork" in alarms(member) | alarms(other)
    assert not member.allows(identity(8).peer_id)


# --- M3: a kicked member has the secret, and it is worth nothing --------------------------


async def test_m3_a_kicked_member_gets_no_later_secret(
    autojump_clock: MockClock,
    network: FakeNetwork,
) -> None:
    network.chain.add_peer(KICKED)
    network.chain.add_peer(P)
    machines = [network.add(who) for who in (network.chain.founder, P, KICKED)]
    founder, staying, former = machines
    network.connect_all()
    network.kick(KICKED, 1, NEW_SECRET)
    keep_as_the_command_does(network, founder)
    await until(lambda: staying.secrets.get(1) == NEW_SECRET, within_s=120)
    await trio.sleep(120)
    assert 1 not in former.secrets
    assert former.ended
    for machine in (founder, staying):
        assert machine.keeper.sealed_secret(former.peer_id, 1) == b""
        assert not machine.allows(former.peer_id)


def keep_as_the_command_does(network: FakeNetwork, founder: Machine) -> None:
    """Put list and secret into the profile of the operator's running node."""
    held = Held(entries=tuple(network.chain.entries), word=b"")
    keep_list(founder.profile, network.chain.swarm_id, held)
    founder.save_secret(1, NEW_SECRET)


async def test_m3_a_kicked_member_hears_no_announcement() -> None:
    async with open_swarm() as swarm:
        hub, shard, former = await swarm.start_many(3)
        await shard.meet(hub)
        await former.meet(hub)
        await soon(lambda: all(is_meshed(member) for member in swarm.running))
        swarm.members.discard(former.peer_id)
        await hub.host.drop_peer(former.peer_id)
        await shard.host.drop_peer(former.peer_id)
        await shard.announce(seq=7)
        await soon(lambda: shard.peer_id in seen_by(hub))
        with pytest.raises(PeerUnreachable):
            await ask_for_table(former, hub)
        assert shard.peer_id not in seen_by(former)


async def ask_for_table(asking: Member, other: Member) -> None:
    await asking.host.connect(other.peer_id, other.host.addresses())
    stream = await asking.host.open_stream(other.peer_id, exchange.PROTOCOL)
    await stream.write(b"\0\0\0\1\x80")
    await stream.read_exactly(1)


# --- M4: a kick ends what runs ------------------------------------------------------------


@pytest.mark.parametrize(
    "trials", [2, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(300)])]
)
@pytest.mark.parametrize(("has_gossip", "bar_s"), [(False, 35.0), (True, 3.0)])
async def test_m4_a_kick_cuts_everywhere_in_time(
    autojump_clock: MockClock,
    clock: Clock,
    tmp_path: Path,
    *,
    has_gossip: bool,
    bar_s: float,
    trials: int,
) -> None:
    """Trials at random moments between two polls; the slowest member counts."""
    worst = 0.0
    for trial in range(trials):
        async with open_network(clock, tmp_path / str(trial), seed=trial) as network:
            network.has_gossip = has_gossip
            people = [identity(20 + number) for number in range(4)]
            for who in (*people, KICKED):
                network.chain.add_peer(who)
            founder = network.add(network.chain.founder, signer=network.chain.operator)
            staying = [founder, *(network.add(who) for who in people)]
            network.add(KICKED)
            if has_gossip:
                network.connect_all()
            await trio.sleep(60 + network.rng.random() * 30)
            network.kick(KICKED, 1, NEW_SECRET)
            if has_gossip:
                keep_as_the_command_does(network, founder)
            took = await until(
                lambda machines=staying: all(not m.allows(KICKED.peer_id) for m in machines),
                within_s=100,
            )
            worst = max(worst, took)
            assert all(KICKED.peer_id in machine.cut for machine in staying)
    assert worst <= bar_s


# --- M5: no list is no reason to let everybody in -----------------------------------------

TROUBLES: dict[str, Callable[[FakeNetwork], None]] = {
    "error": lambda n: setattr(
        n.backend, "error", BackendRefused(url="http://127.0.0.1:1", status=500, problem="no")
    ),
    "away": lambda n: n.backend.go_away(),
    "silent": lambda n: n.backend.fall_silent(),
    "empty list": lambda n: setattr(n.backend, "lie", []),
    "garbage": lambda n: setattr(n.backend, "lie", [b"garbage"]),
    "old list": lambda n: setattr(n.backend, "lie", n.chain.entries[:3]),
    "no word": lambda n: setattr(n.backend, "gives_word", False),
}


@pytest.mark.parametrize("days", [-40, 0, 40])
@pytest.mark.parametrize("trouble", TROUBLES)
async def test_m5_whatever_the_backend_and_the_clock_do_nobody_else_gets_in(
    autojump_clock: MockClock,
    seldom: None,
    clock: Clock,
    tmp_path: Path,
    trouble: str,
    days: int,
) -> None:
    async with open_network(clock, tmp_path, max_stale_s=MAX_STALE_S) as network:
        network.chain.add_peer(P)
        network.chain.add_peer(Q)
        member = network.add(Q)
        honest = admitted(member)
        network.backend.clock = Clock()
        await trio.sleep(31)
        TROUBLES[trouble](network)
        clock.offset_s = days * DAY_S
        while state(member) != "expired":
            assert admitted(member) == honest
            await trio.sleep(20)
        assert admitted(member) == frozenset()
        assert not member.allows(P.peer_id)
