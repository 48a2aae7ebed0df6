from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest
import trio
import trio.testing

from pals.engine.scheduler import WorkItem
from pals.engine.worker import ComputeThread, StepResult
from pals.errors import (
    InternalStepError,
    InvalidFrame,
    InvalidStep,
    PeerUnreachable,
    SessionRefused,
    ShardDraining,
)
from pals.net.control import (
    Close,
    Draining,
    Failed,
    Hop,
    Open,
    Opened,
    Refused,
)
from pals.net.early import EARLY_S
from pals.net.links import Arrival, Links
from pals.net.ring import SessionTable
from pals.net.shard_service import EXPIRY_INTERVAL_S, ModelShape, ShardService
from pals.net.wire import Frame, Lane, Row, Rows, tokens_shape
from pals.types import EngineLimits, LayerRange, PeerId, SessionId
from tests.unit.net.shard_fakes import DRIVER, LOCAL, NEXT, FakeCompute, FakeLinks

SESSION, OTHER = SessionId(b"s" * 16), SessionId(b"o" * 16)
MODEL = ModelShape(manifest=b"m" * 32, num_layers=2, hidden_size=4, dtype="bf16")


class Bench:
    """A shard between fakes: of the whole model, or of its first layers."""

    def __init__(self, nursery: trio.Nursery, stop: int = MODEL.num_layers) -> None:
        self.links, self.compute = FakeLinks(), FakeCompute()
        self.stop = stop
        table = SessionTable(
            local=LOCAL,
            layers=LayerRange(0, stop),
            num_layers=MODEL.num_layers,
            limits=EngineLimits(max_sessions=2, max_context_tokens=32, max_chunk_tokens=16),
            idle_s=60.0,
        )
        self.service = ShardService(cast("Links", self.links), table, MODEL, nursery)
        self.service.attach(cast("ComputeThread", self.compute))

    async def open(self, session: SessionId = SESSION, next_hop: PeerId = NEXT) -> None:
        chain = (Hop(peer=LOCAL, start=0, stop=self.stop),)
        if self.stop < MODEL.num_layers:
            chain += (Hop(peer=next_hop, start=self.stop, stop=MODEL.num_layers),)
        message = Open(session=session, chain=chain, prompt_tokens=3, max_new_tokens=4)
        self.service.on_control(DRIVER, message)
        await trio.testing.wait_all_tasks_blocked()

    def send_prompt(self, session: SessionId = SESSION) -> WorkItem:
        self.send_rows(DRIVER, Lane.PREFILL, Row(session, 0, 3))
        return self.compute.items[-1]

    def send_rows(self, sender: PeerId, lane: Lane, *rows: Row) -> None:
        count = sum(row.num_tokens for row in rows)
        payload = memoryview(np.arange(count, dtype="<i4").tobytes())
        frame = Frame(lane, tokens_shape(MODEL.manifest), Rows.of(*rows), payload)
        self.service.on_rows(sender, Arrival(frame, 0.0, 0.0))

    def finish(self, item: WorkItem) -> None:
        token = np.array([7], np.int32)
        step = StepResult(items=[item], outputs=token, free_s=0.0, started_s=1.0, finished_s=2.0)
        self.service.on_step(step)


@pytest.mark.trio
async def test_sampled_token_goes_round_the_ring_and_to_the_driver() -> None:
    async with trio.open_nursery() as nursery:
        bench = Bench(nursery)
        await bench.open()
        bench.finish(bench.send_prompt())
    assert bench.links.control() == [Opened(session=SESSION)]
    assert bench.links.rows() == [(LOCAL, Row(SESSION, 3, 1)), (DRIVER, Row(SESSION, 3, 1))]


@pytest.mark.trio
@pytest.mark.parametrize("prompt_again", [False, True])
async def test_step_of_an_ended_session_is_not_given_to_its_successor(prompt_again: bool) -> None:
    """Otherwise the driver could make this process send rows that its own ring refuses."""
    async with trio.open_nursery() as nursery:
        bench = Bench(nursery)
        await bench.open()
        running = bench.send_prompt()
        bench.service.on_control(DRIVER, Close(session=SESSION))
        await bench.open()
        if prompt_again:
            bench.send_prompt()
        bench.finish(running)
    assert bench.links.rows() == []


@pytest.mark.trio
async def test_stale_row_ends_its_own_session_and_the_others_of_its_frame_go_on() -> None:
    async with trio.open_nursery() as nursery:
        bench = Bench(nursery)
        for session in (SESSION, OTHER):
            await bench.open(session)
            bench.finish(bench.send_prompt(session))
        bench.service.on_control(DRIVER, Close(session=SESSION))
        await bench.open(SESSION)
        bench.links.sent.clear()
        bench.send_rows(LOCAL, Lane.DECODE, Row(SESSION, 3, 1), Row(OTHER, 3, 1))
        taken = bench.compute.items[-1]
        bench.send_rows(DRIVER, Lane.PREFILL, Row(SESSION, 0, 3))
    (failed,) = bench.links.control()
    assert isinstance(failed, Failed)
    assert (failed.session, failed.code) == (SESSION, InvalidFrame.code)
    assert (taken.position, taken.inputs.tolist()) == (3, [1])
    assert bench.compute.items[-1] is taken


@pytest.mark.trio
async def test_row_of_a_session_of_others_is_ignored() -> None:
    async with trio.open_nursery() as nursery:
        bench = Bench(nursery)
        await bench.open()
        bench.send_rows(PeerId("stranger"), Lane.PREFILL, Row(SESSION, 0, 3))
        assert bench.compute.items == []
        bench.send_prompt()
    assert bench.links.control() == [Opened(session=SESSION)]
    assert len(bench.compute.items) == 1


@pytest.mark.trio
@pytest.mark.parametrize(
    ("error", "code", "ended"),
    [
        (RuntimeError("XLA"), InternalStepError.code, {SESSION, OTHER}),
        (InvalidStep(problem="x"), InvalidStep.code, {SESSION}),
    ],
)
async def test_step_that_fails_ends_all_sessions_and_one_that_is_refused_its_own(
    error: Exception, code: str, ended: set[SessionId]
) -> None:
    async with trio.open_nursery() as nursery:
        bench = Bench(nursery)
        items: list[WorkItem] = []
        for session in (SESSION, OTHER):
            await bench.open(session)
            items.append(bench.send_prompt(session))
        bench.service.on_step(
            StepResult(
                items=items[:1],
                outputs=np.empty(0, np.int32),
                free_s=0.0,
                started_s=1.0,
                finished_s=2.0,
                error=error,
            )
        )
    failed = [message for message in bench.links.control() if isinstance(message, Failed)]
    assert {message.session for message in failed} == ended
    assert {message.code for message in failed} == {code}
    assert bench.service.free_sessions == len(ended)
    assert bench.compute.items == items[len(ended) :]


@pytest.mark.trio
async def test_closed_session_no_longer_waits_for_a_silent_hop(nursery: trio.Nursery) -> None:
    bench = Bench(nursery, stop=1)
    bench.links.silent.add(NEXT)
    tasks = len(nursery.child_tasks)
    for _ in range(10):
        await bench.open()
        assert len(nursery.child_tasks) == tasks + 1
        bench.service.on_control(DRIVER, Close(session=SESSION))
        await trio.testing.wait_all_tasks_blocked()
    assert len(nursery.child_tasks) == tasks
    assert bench.links.control() == []


@pytest.mark.trio
async def test_rows_of_a_session_whose_next_hop_is_unreachable_do_not_run(
    nursery: trio.Nursery,
) -> None:
    bench = Bench(nursery, stop=1)
    bench.links.silent.add(NEXT)
    await bench.open()
    bench.send_rows(DRIVER, Lane.PREFILL, Row(SESSION, 0, 3))
    assert bench.compute.items == []
    bench.links.unreachable.set()
    await trio.testing.wait_all_tasks_blocked()
    (refused,) = bench.links.control()
    assert isinstance(refused, Refused)
    assert refused.code == PeerUnreachable.code
    assert bench.compute.items == []


@pytest.mark.trio
async def test_chain_with_a_stranger_is_refused_and_keeps_nothing(nursery: trio.Nursery) -> None:
    bench = Bench(nursery, stop=1)
    await bench.open(next_hop=PeerId("stranger"))
    (refused,) = bench.links.control()
    assert isinstance(refused, Refused)
    assert refused.code == SessionRefused.code
    assert "no member" in refused.problem
    assert bench.service.free_sessions == 2


@pytest.mark.trio
async def test_a_session_that_ends_as_its_link_comes_up_is_not_told_as_open(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(nursery, stop=MODEL.num_layers - 1)

    async def come_up_too_late(peer: PeerId, addresses: Sequence[str]) -> None:
        await trio.lowlevel.checkpoint()
        bench.service.on_peer_lost(DRIVER, "gone")

    monkeypatch.setattr(bench.links, "ensure", come_up_too_late)
    await bench.open()
    await trio.testing.wait_all_tasks_blocked()

    assert not any(isinstance(message, Opened) for message in bench.links.control())


# --- a prompt that comes before it is known where it goes ----------------------------


@pytest.mark.trio
@pytest.mark.parametrize("stop", [1, 2])
async def test_prompt_before_its_open_runs_once_that_comes(
    nursery: trio.Nursery, stop: int
) -> None:
    bench = Bench(nursery, stop)
    bench.send_rows(DRIVER, Lane.PREFILL, Row(SESSION, 0, 2), Row(OTHER, 0, 1))
    bench.send_rows(DRIVER, Lane.PREFILL, Row(SESSION, 2, 1))
    assert bench.compute.items == []
    await bench.open()

    assert [(item.position, item.inputs.tolist()) for item in bench.compute.items] == [
        (0, [0, 1]),
        (2, [0]),
    ]
    assert bench.links.control() == [Opened(session=SESSION)]


@pytest.mark.trio
async def test_prompt_waits_for_the_link_to_the_next_hop_and_then_runs(
    nursery: trio.Nursery,
) -> None:
    bench = Bench(nursery, stop=1)
    come_up = trio.Event()

    async def ensure(peer: PeerId, addresses: Sequence[str]) -> None:
        await come_up.wait()

    bench.links.ensure = ensure
    await bench.open()
    bench.send_rows(DRIVER, Lane.PREFILL, Row(SESSION, 0, 2))
    bench.send_rows(DRIVER, Lane.PREFILL, Row(SESSION, 2, 1))
    assert (bench.compute.items, bench.links.control()) == ([], [])
    come_up.set()
    await trio.testing.wait_all_tasks_blocked()

    assert [item.position for item in bench.compute.items] == [0, 2]
    assert bench.links.control() == [Opened(session=SESSION)]


@pytest.mark.trio
async def test_a_tail_that_does_not_reach_its_head_yet_gives_it_the_token_later(
    nursery: trio.Nursery,
) -> None:
    bench = Bench(nursery)
    come_up = trio.Event()

    async def ensure(peer: PeerId, addresses: Sequence[str]) -> None:
        await come_up.wait()

    bench.links.ensure = ensure
    await bench.open()
    bench.finish(bench.send_prompt())
    assert bench.links.rows() == [(DRIVER, Row(SESSION, 3, 1))]
    come_up.set()
    await trio.testing.wait_all_tasks_blocked()
    assert bench.links.rows() == [(DRIVER, Row(SESSION, 3, 1)), (LOCAL, Row(SESSION, 3, 1))]


@pytest.mark.trio
@pytest.mark.parametrize("end", ["closed", "refused"])
async def test_late_rows_of_a_session_that_is_over_are_not_kept(
    nursery: trio.Nursery, end: str
) -> None:
    bench = Bench(nursery, stop=1)
    await bench.open(next_hop=NEXT if end == "closed" else PeerId("stranger"))
    bench.service.on_control(DRIVER, Close(session=SESSION))
    bench.send_rows(DRIVER, Lane.PREFILL, Row(SESSION, 0, 3))
    bench.send_rows(DRIVER, Lane.DECODE, Row(OTHER, 0, 1))

    assert len(bench.service._early) == 0


@pytest.mark.trio
async def test_early_rows_of_another_than_the_upstream_are_no_part_of_the_prompt(
    nursery: trio.Nursery,
) -> None:
    bench = Bench(nursery)
    bench.send_rows(PeerId("stranger"), Lane.PREFILL, Row(SESSION, 0, 3))
    await bench.open()
    assert bench.compute.items == []
    bench.send_prompt()
    assert len(bench.compute.items) == 1


@pytest.mark.trio
async def test_session_whose_early_rows_were_given_up_is_refused_and_keeps_no_slot(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    bench = Bench(nursery)
    nursery.start_soon(bench.service.expire_sessions)
    bench.send_rows(DRIVER, Lane.PREFILL, Row(SESSION, 0, 3))
    await trio.sleep(EARLY_S + EXPIRY_INTERVAL_S + 0.1)
    assert len(bench.service._early) == 0
    await bench.open()

    (refused,) = bench.links.control()
    assert isinstance(refused, Refused)
    assert (refused.code, bench.service.free_sessions) == (SessionRefused.code, 2)
    await bench.open()
    assert bench.links.control()[1:] == [Opened(session=SESSION)]
    nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_early_rows_that_do_not_fit_their_session_end_it(nursery: trio.Nursery) -> None:
    bench = Bench(nursery)
    bench.send_rows(DRIVER, Lane.PREFILL, Row(SESSION, 1, 2))
    await bench.open()

    assert bench.compute.items == []
    assert bench.service.free_sessions == 2
    assert [type(m) for m in bench.links.control()] == [Failed]


# --- leaving -------------------------------------------------------------------------


@pytest.mark.trio
async def test_draining_shard_tells_its_drivers_and_is_done_with_its_last_session(
    nursery: trio.Nursery,
) -> None:
    bench = Bench(nursery)
    await bench.open()
    left = trio.Event()

    async def drain() -> None:
        await bench.service.drain()
        left.set()

    nursery.start_soon(drain)
    await trio.testing.wait_all_tasks_blocked()
    assert bench.links.control() == [Opened(session=SESSION), Draining()]
    assert not left.is_set()

    bench.finish(bench.send_prompt())
    assert len(bench.links.rows()) == 2, "its session goes on"
    bench.service.on_control(DRIVER, Close(session=SESSION))
    await trio.testing.wait_all_tasks_blocked()
    assert left.is_set()


@pytest.mark.trio
async def test_draining_shard_refuses_new_sessions_and_offers_none(nursery: trio.Nursery) -> None:
    bench = Bench(nursery)
    await bench.service.drain()
    await bench.open()

    (refused,) = bench.links.control()
    assert isinstance(refused, Refused)
    assert refused.code == ShardDraining.code
    assert bench.service.free_sessions == 0


@pytest.mark.trio
async def test_lost_neighbour_is_named_to_the_driver(nursery: trio.Nursery) -> None:
    bench = Bench(nursery, stop=1)
    await bench.open()
    bench.service.on_peer_lost(NEXT, "reset")

    assert [m.peer for m in bench.links.control() if isinstance(m, Failed)] == [NEXT]


@pytest.mark.trio
async def test_hop_that_cannot_be_reached_is_named_to_the_driver(nursery: trio.Nursery) -> None:
    bench = Bench(nursery, stop=1)
    bench.links.silent.add(NEXT)
    bench.links.unreachable.set()
    await bench.open()

    assert [m.peer for m in bench.links.control() if isinstance(m, Refused)] == [NEXT]
