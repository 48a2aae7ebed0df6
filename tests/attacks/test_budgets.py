"""P9, P10 and P14: what one member may cost the others."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import trio
import trio.testing

from pals.net.control import Failed, Hop, Open, Refused
from pals.net.links import Arrival
from pals.net.ring import SessionTable
from pals.net.shard_service import ModelShape, ShardService
from pals.net.wire import Frame, Lane, Row, Rows, buffer_of, hidden_shape
from pals.types import EngineLimits, LayerRange, PeerId, SessionId
from tests.integration.net.harness import ask_echo, open_hosts
from tests.unit.net.shard_fakes import FakeCompute, FakeLinks

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
    nursery: trio.Nursery,
) -> None:
    victim = Victim(nursery)
    for number in range(10_000):
        victim.open(SQUATTER, number)
    await trio.testing.wait_all_tasks_blocked()
    assert len(victim.table) == 8
    assert {refusal.code for refusal in victim.said(Refused)} == {"PALS-SHARD-FULL"}
    assert len(victim.said(Refused)) == 10_000 - 8
    refused = len(victim.said(Refused))
    good = [victim.open(GOOD, number) for number in range(2)]
    await trio.testing.wait_all_tasks_blocked()
    assert len(victim.said(Refused)) == refused
    assert all(victim.table.get(session) is not None for session in good)
    assert [failed.code for failed in victim.said(Failed)] == ["PALS-SHARD-FULL"] * 2
    for number in range(100):
        victim.open(SQUATTER, 20_000 + number)
    assert all(victim.table.get(session) is not None for session in good)
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
    assert [item.session.session for item in victim.compute.items] == [other]
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
    assert not [item for item in victim.compute.items if item.session.session == failed.session]
