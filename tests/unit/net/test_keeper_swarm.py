"""Members that keep list and secret among themselves, on a virtual network and clock."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import trio
from trio.testing import MockClock

from pals.errors import PeerUnreachable
from pals.net import keeper as keeper_module
from pals.net.membership import keep_list, load_saved
from pals.net.roster_exchange import SECRET_PROTOCOL
from pals.swarm.kept import keep_removals
from pals.swarm.ledger import Held
from pals.swarm.news import encode_news
from pals.swarm.records import digest
from pals.swarm.sealing import seal_secret
from pals.types import PeerId
from tests.unit.net.keepers import Clock, FakeNetwork, Machine, open_network, until
from tests.unit.swarm.chains import Chain, identity

NEW_SECRET = digest(b"the next secret")
STALE_S = 1200.0

pytestmark = pytest.mark.trio


@pytest.fixture
async def network(clock: Clock, tmp_path: Path) -> AsyncIterator[FakeNetwork]:
    async with open_network(clock, tmp_path, max_stale_s=STALE_S) as network:
        yield network


@pytest.fixture
def seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the profile seldom, where a test lasts for days."""
    monkeypatch.setattr(keeper_module, "WATCH_S", 60.0)


def alarms(machine: Machine) -> set[str]:
    return set(machine.ledger.alarms)


def state(machine: Machine) -> str:
    return machine.allow_list.state(trio.current_time())


STAYING = [identity(number) for number in range(20, 23)]
EX = identity(30)


async def full_swarm(network: FakeNetwork) -> list[Machine]:
    """Run an operator, three members and one that will be kicked, all connected."""
    chain = network.chain
    for who in (*STAYING, EX):
        chain.add_peer(who)
    network.add(chain.founder, signer=chain.operator)
    for who in (*STAYING, EX):
        network.add(who)
    await trio.sleep(1)
    network.connect_all()
    await trio.sleep(1)
    return [machine for machine in network.members if machine.peer_id != EX.peer_id]


def kick_by_command(network: FakeNetwork, operator: Machine) -> None:
    """Do what `pals peers kick` does on the operator's machine."""
    network.kick(EX, 1, NEW_SECRET)
    keep_list(operator.profile, network.chain.swarm_id, Held(entries=tuple(network.chain.entries)))
    operator.save_secret(1, NEW_SECRET)


def is_through(machine: Machine) -> bool:
    gone = EX.peer_id not in machine.host.connected and not machine.allows(EX.peer_id)
    return gone and machine.secrets.get(1) == NEW_SECRET


@pytest.mark.parametrize("seed", range(20))
async def test_a_kick_reaches_every_member_within_3_s_by_gossip(
    autojump_clock: MockClock, clock: Clock, tmp_path: Path, seed: int
) -> None:
    async with open_network(clock, tmp_path, seed=seed) as network:
        staying = await full_swarm(network)
        ex = network.machines[EX.peer_id]
        kick_by_command(network, staying[0])
        await until(lambda: all(map(is_through, staying)), within_s=3.0)
        assert all(set(machine.cut) == {EX.peer_id} for machine in staying if machine.cut)
        assert NEW_SECRET not in ex.secrets.values()
        for machine in staying:
            entry = machine.profile.load_swarm()
            assert (entry.epoch, len(machine.secrets)) == (1, 2)
            saved = load_saved(machine.profile, network.chain.swarm_id)
            assert saved is not None
            assert EX.peer_id not in saved.roster.live


@pytest.mark.parametrize("seed", range(20))
async def test_a_kick_reaches_every_member_within_35_s_by_polling_alone(
    autojump_clock: MockClock, clock: Clock, tmp_path: Path, seed: int
) -> None:
    async with open_network(clock, tmp_path, seed=seed) as network:
        staying = await full_swarm(network)
        network.has_gossip = False
        for machine in staying:  # nor do they compare lists
            machine.host.handlers.pop("/pals/roster/1")
        await trio.sleep(network.rng.uniform(0, 30))
        kick_by_command(network, staying[0])
        await until(lambda: all(map(is_through, staying)), within_s=35.0)


async def test_the_kicked_member_gets_nothing_more(
    autojump_clock: MockClock, clock: Clock, tmp_path: Path
) -> None:
    async with open_network(clock, tmp_path) as network:
        staying = await full_swarm(network)
        kick_by_command(network, staying[0])
        await until(lambda: all(map(is_through, staying)), within_s=3.0)
        ex = network.machines[EX.peer_id]
        for machine in staying:  # as if a member's gate let it through
            assert machine.keeper.sealed_secret(EX.peer_id, 1) == b""
            assert machine.keeper.sealed_secret(EX.peer_id, 0) == b""
            ex.host.connected.add(machine.peer_id)
            with pytest.raises(PeerUnreachable):
                await ex.host.open_stream(machine.peer_id, SECRET_PROTOCOL)
        await until(lambda: bool(ex.ended), within_s=35.0)  # an honest one ends by itself


async def test_a_late_comer_gets_the_newest_secret_from_any_member(
    autojump_clock: MockClock, clock: Clock, tmp_path: Path
) -> None:
    async with open_network(clock, tmp_path) as network:
        staying = await full_swarm(network)
        late = staying.pop()
        late.scope.cancel()
        network.machines.pop(late.peer_id)
        before = tuple(network.chain.entries)
        kick_by_command(network, staying[0])
        await until(lambda: all(map(is_through, staying)), within_s=3.0)
        network.kick(STAYING[0], 2, digest(b"later still"))
        staying[0].save_secret(2, digest(b"later still"))
        rest = [m for m in staying if m.peer_id != STAYING[0].peer_id]
        network.connect(*rest)
        await until(lambda: all(2 in m.secrets for m in rest), within_s=40.0)
        staying[0].scope.cancel()  # the operator goes
        network.machines.pop(staying[0].peer_id)
        back = network.add(late.identity, entries=before)
        await trio.sleep(0.1)
        network.connect(back, rest[1])
        await until(lambda: back.secrets.get(2) == digest(b"later still"), within_s=3.0)
        assert back.expected == [2]
        assert 1 not in back.secrets


async def test_a_secret_that_was_not_committed_to_is_refused(
    autojump_clock: MockClock, network: FakeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    staying = await full_swarm(network)

    def seal(_: bytes, **bound: object) -> bytes:
        return seal_secret(bytes(32), **bound)  # type: ignore[arg-type]

    monkeypatch.setattr(keeper_module, "seal_secret", seal)
    kick_by_command(network, staying[0])
    await trio.sleep(10)
    for machine in staying[1:]:
        assert machine.expected == [1]
        assert 1 not in machine.secrets
        assert machine.profile.load_swarm().epoch == 0


async def test_a_removal_that_the_backend_did_not_take_goes_from_member_to_member(
    autojump_clock: MockClock, network: FakeNetwork
) -> None:
    staying = await full_swarm(network)
    network.backend.go_away()
    away = staying.pop()
    away.scope.cancel()
    chain = network.chain
    removal = chain.remove(EX, joined=chain.roster().live[EX.peer_id].joined)
    keep_removals(staying[0].profile, chain.swarm_id, (removal,))
    await until(lambda: not any(machine.allows(EX.peer_id) for machine in staying), within_s=3.0)
    late = network.add(away.identity)  # it knows nothing of it yet
    assert late.allows(EX.peer_id)
    network.connect(late, staying[1])
    await until(lambda: not late.allows(EX.peer_id), within_s=3.0)
    saved = load_saved(staying[1].profile, chain.swarm_id)
    assert saved is not None
    assert saved.held.removals == (removal,)


async def test_a_swarm_with_its_operator_outlives_its_backend(
    autojump_clock: MockClock, seldom: None, network: FakeNetwork
) -> None:
    staying = await full_swarm(network)
    network.backend.go_away()
    await trio.sleep(2 * STALE_S)
    assert {state(machine) for machine in staying} == {"fresh"}
    staying[0].scope.cancel()
    network.machines.pop(staying[0].peer_id)
    await trio.sleep(200)
    assert {state(machine) for machine in staying[1:]} == {"stale"}
    await trio.sleep(STALE_S)
    assert {state(machine) for machine in staying[1:]} == {"expired"}


async def test_members_that_are_shown_two_lists_notice(
    autojump_clock: MockClock, network: FakeNetwork
) -> None:
    chain = network.chain
    for who in STAYING[:2]:
        chain.add_peer(who)
    fork = Chain(entries=list(chain.entries))
    chain.append(chain.certificate(chain.invite()))
    fork.append(fork.certificate(fork.invite()))
    one = network.add(STAYING[0])
    other = network.add(STAYING[1], entries=fork.entries)
    await trio.sleep(1)
    network.connect(one, other)
    await until(lambda: alarms(one) >= {"fork"} and alarms(other) >= {"fork"}, within_s=3.0)
    assert one.ledger.roster.heads != other.ledger.roster.heads


async def test_a_backend_that_hides_an_entry_is_noticed(
    autojump_clock: MockClock, network: FakeNetwork
) -> None:
    chain = network.chain
    for who in STAYING[:2]:
        chain.add_peer(who)
    one, other = network.add(STAYING[0]), network.add(STAYING[1])
    await trio.sleep(31)
    network.backend.lie = list(chain.entries)
    chain.append(chain.certificate(chain.invite()), at=int(network.clock.time()))
    keep_list(one.profile, chain.swarm_id, Held(entries=tuple(chain.entries)))
    network.connect(one, other)
    await until(lambda: other.ledger.roster.seq == chain.roster().seq, within_s=3.0)
    await until(lambda: "freeze" in alarms(other), within_s=40.0)
    assert other.ledger.roster.seq == chain.roster().seq


async def test_a_member_that_claims_more_than_it_has_costs_a_few_questions(
    autojump_clock: MockClock, network: FakeNetwork
) -> None:
    staying = await full_swarm(network)
    liar, victim = staying[1], staying[2]
    news = msgspec.structs.replace(liar.ledger.news(), seq=1999, head=bytes(32))
    network.connect(liar, victim)
    asked: list[PeerId] = []
    ask = victim.keeper.compare

    async def count(peer: PeerId) -> None:
        asked.append(peer)
        await ask(peer)

    victim.keeper.compare = count  # type: ignore[method-assign]
    for _ in range(200):
        victim.keeper.judge(liar.peer_id, encode_news(news))
    await trio.sleep(5)
    assert 1 <= len(asked) <= 12
    assert victim.ledger.roster.seq == network.chain.roster().seq


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x90", bytes(12 << 10), b"\x95" + bytes(64)])
async def test_news_that_do_not_decode_go_no_further(
    autojump_clock: MockClock, network: FakeNetwork, data: bytes
) -> None:
    member = network.add(network.chain.founder)
    assert not member.keeper.judge(EX.peer_id, data)
