"""P9, P10 and P14: what one member may cost the others."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import trio
import trio.testing

from pals.engine.batch import Admitted
from pals.engine.work import Delivery, OwnedEvent
from pals.net.control import Failed, Hop, Open, Opened, Refused
from pals.net.links import Arrival
from pals.net.model_shape import ModelShape
from pals.net.ring import SessionTable
from pals.net.shard_service import ShardService
from pals.net.wire import Frame, Lane, Row, Rows, buffer_of, hidden_shape
from pals.types import EngineLimits, LayerRange, PeerId, SessionId
from tests.integration.net.harness import ask_echo, open_hosts
from tests.unit.net.shard_fakes import FakeCompute, FakeLinks
from tests.unit.net.virtual_ring import VirtualDriver, VirtualRing, Wires

pytestmark = pytest.mark.trio

SQUATTER, GOOD, LOCAL, BEFORE = map(PeerId, ("squatter", "good", "local", "before"))
MODEL = ModelShape(manifest=b"m" * 32, num_layers=2, hidden_size=4, dtype="bf16")


class Victim:
    """A shard of the last layer, or of the whole model, between fakes."""

    def __init__(self, nursery: trio.Nursery, start: int = 0) -> None:
        self.links, self.compute, self.start = FakeLinks(), FakeCompute(), start
        self.links.members |= {SQUATTER, GOOD, BEFORE}
        table = SessionTable(
            local=LOCAL,
            layers=LayerRange(start, MODEL.num_layers),
            num_layers=MODEL.num_layers,
            limits=EngineLimits(max_sessions=8, max_context_tokens=64, max_chunk_tokens=16),
            idle_s=60.0,
        )
        self.service = ShardService(self.links, table, MODEL, nursery)  # type: ignore[arg-type]
        self.service.attach(self.compute)  # type: ignore[arg-type]
        self.table = table

    def open(self, driver: PeerId, number: int) -> SessionId:
        session = SessionId(driver.encode().ljust(8)[:8] + number.to_bytes(8, "big"))
        chain = (Hop(peer=LOCAL, start=self.start, stop=MODEL.num_layers),)
        if self.start:
            chain = (Hop(peer=BEFORE, start=0, stop=self.start), *chain)
        opening = Open(session=session, chain=chain, prompt_tokens=3, max_new_tokens=4)
        self.service.on_control(driver, opening)
        admitted = OwnedEvent(self.compute.owners[session], Admitted(session, 0))
        self.service.on_delivery(Delivery(events=(admitted,), result=None))
        return session

    def receive(self, session: SessionId, states: np.ndarray, position: int = 0) -> None:
        """Take hidden states from the shard before this one."""
        shape = hidden_shape(MODEL.manifest, self.start, "bf16", MODEL.hidden_size)
        rows = Rows.of(Row(session, position, len(states)))
        lane = Lane.PREFILL if position < 3 else Lane.DECODE
        frame = Frame(lane, shape, rows, buffer_of(states))
        self.service.on_rows(BEFORE, Arrival(frame, 0.0, 0.0))

    def said(self, kind: type) -> list:
        return [message for message in self.links.control() if isinstance(message, kind)]


# --- P9: squatters --------------------------------------------------------------------------


async def test_p9_a_member_that_opens_ten_thousand_sessions_keeps_nobody_out(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    """It fills the pages of a shard, whose line, and as many sessions as one may have."""
    wires = Wires(nursery, delay_s=0.001, bytes_per_s=1e9)
    ring = VirtualRing(
        nursery,
        wires,
        shards=1,
        step_s=lambda *_: 0.01,
        limits=EngineLimits(max_sessions=300, max_context_tokens=512, max_chunk_tokens=64),
        hidden_size=4,
        num_pages=[64],
    )
    squatters = [VirtualDriver("squatter", ring, number=n) for n in range(300)]
    for squatter in squatters:
        squatter.ask(200, 100)
        squatter.send_prompt(200)
    await trio.sleep(5.0)
    chain = ring.chain()
    for number in range(10_000):
        session = number.to_bytes(16, "big")
        message = Open(session=session, chain=chain, prompt_tokens=200, max_new_tokens=100)
        ring.services[0].on_control(PeerId("squatter"), message)
    await trio.sleep(1.0)
    assert ring.services[0].sessions <= 256
    refused = [a.code for a in squatters[-1].answers if isinstance(a, Refused)]
    assert set(refused) == {"PALS-PEER-SESSIONS"}
    assert len(refused) == 10_300 - 256

    good = VirtualDriver("good", ring)
    good.ask(200, 50)
    good.send_prompt(200)
    with trio.fail_after(12.0):  # those who wait before it do so for 10 s at most
        await good.finish()
    assert not [answer for answer in good.answers if not isinstance(answer, Opened)]
    nursery.cancel_scope.cancel()


async def test_p9_sessions_that_say_nothing_end_by_themselves(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    victim = Victim(nursery)
    nursery.start_soon(victim.service.expire_sessions)
    for number in range(8):
        victim.open(SQUATTER, number)
    await trio.sleep(70)
    assert len(victim.table) == 0
    assert {failed.code for failed in victim.said(Failed)} == {"PALS-SESSION-IDLE"}
    nursery.cancel_scope.cancel()


# --- P10: floods of connections and streams ----------------------------------------------------


async def test_p10_a_flood_of_one_peer_does_not_keep_a_good_one_out():
    """500 half-open handshakes and 1,000 streams of one member, of which 64 are served."""
    held = []

    async def hold(stream):
        held.append(stream)
        await trio.sleep_forever()

    async with open_hosts(3) as (_, (flooder, server, good)):
        server.handle("/test/hold/1", hold)
        port = int(server.addresses()[0].split("/")[4])
        await flooder.connect(server.peer_id, server.addresses())
        silent = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(500)]
        (connection,) = flooder._swarm.get_connections()
        for _ in range(1000):
            await connection.muxed_conn.open_stream()
        with trio.fail_after(2):
            await good.connect(server.peer_id, server.addresses())
            assert await ask_echo(good, server) == b"hello"
        (flooded,) = server._swarm.live_connections(flooder.libp2p_host.get_id())
        assert flooded.muxed_conn.mux.num_streams <= 64
        assert len(server._swarm._handshakes) <= 32
        for stream in silent:
            await stream.aclose()


# --- P14: numbers that are none ------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("position", [0, 3])
async def test_p14_hidden_states_that_no_model_makes_end_the_session_and_name_their_sender(
    nursery: trio.Nursery, wrong: float, position: int
) -> None:
    victim = Victim(nursery, start=1)
    session = await ready_session(victim, position)
    states = ordinary(3 if position == 0 else 1)
    states[-1, 2] = wrong
    victim.receive(session, states, position)
    assert_blamed(victim)
    nursery.cancel_scope.cancel()


async def test_p14_a_member_that_answers_with_zeros_is_named(nursery: trio.Nursery) -> None:
    victim = Victim(nursery, start=1)
    session = await ready_session(victim, 3)
    victim.receive(session, np.zeros((1, 4), ml_dtypes.bfloat16), 3)
    assert_blamed(victim)
    nursery.cancel_scope.cancel()


async def test_p14_only_the_session_of_the_wrong_numbers_ends(nursery: trio.Nursery) -> None:
    victim = Victim(nursery, start=1)
    other = victim.open(SQUATTER, 1)
    session = await ready_session(victim, 0)
    victim.receive(session, np.full((3, 4), np.nan, ml_dtypes.bfloat16))
    victim.receive(other, ordinary(3))
    assert_blamed(victim)
    assert [item.session for item in victim.compute.items] == [other]
    nursery.cancel_scope.cancel()


async def ready_session(victim: Victim, position: int) -> SessionId:
    """Open a session that has taken ``position`` tokens."""
    session = victim.open(GOOD, 0)
    await trio.testing.wait_all_tasks_blocked()
    if position:
        victim.receive(session, ordinary(position))
        victim.compute.items.clear()
    return session


def ordinary(tokens: int) -> np.ndarray:
    return np.linspace(-2, 2, tokens * 4).reshape(tokens, 4).astype(ml_dtypes.bfloat16)


def assert_blamed(victim: Victim) -> None:
    (failed,) = victim.said(Failed)
    assert failed.code == "PALS-ACTIVATION-INVALID"
    assert failed.peer == BEFORE
    assert f"from peer {BEFORE}" in failed.problem
    assert not [item for item in victim.compute.items if item.session == failed.session]
