from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest
import trio
import trio.testing

from pals.engine import batch
from pals.engine.compute import ComputeThread
from pals.engine.work import Delivery, InputRow, OwnedEvent
from pals.errors import (
    AdmissionTimeout,
    InternalStepError,
    InvalidFrame,
    InvalidStep,
    PalsError,
    PeerUnreachable,
    QueueFull,
    SessionRefused,
    ShardDraining,
    ShardFull,
)
from pals.net.control import (
    Close,
    Draining,
    Failed,
    Fork,
    Hop,
    Open,
    Opened,
    Preempted,
    Refused,
    Sampler,
)
from pals.net.early import EARLY_S
from pals.net.links import Arrival, Links
from pals.net.model_shape import ModelShape
from pals.net.ring import SessionTable
from pals.net.scores import Score, unpack_scores
from pals.net.shard_service import EXPIRY_INTERVAL_S, ShardService
from pals.net.wire import Frame, Kind, Lane, Row, Rows, tokens_shape
from pals.types import EngineLimits, LayerRange, PeerId, Sampling, SessionId
from tests.unit.net.shard_fakes import (
    DRIVER,
    FREE_TOKENS,
    LOCAL,
    NEXT,
    FakeCompute,
    FakeLinks,
    make_result,
)

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
            limits=EngineLimits(
                max_sessions=2, max_context_tokens=32, max_chunk_tokens=16, verify_tokens=8
            ),
            idle_s=60.0,
        )
        self.service = ShardService(cast("Links", self.links), table, MODEL, nursery)
        self.service.attach(cast("ComputeThread", self.compute))

    async def open(
        self,
        session: SessionId = SESSION,
        next_hop: PeerId = NEXT,
        *,
        held: int | None = 0,
        **fields: Any,
    ) -> None:
        """Open a session, which has its room at once unless ``held`` is None."""
        chain = (Hop(peer=LOCAL, start=0, stop=self.stop),)
        if self.stop < MODEL.num_layers:
            chain += (Hop(peer=next_hop, start=self.stop, stop=MODEL.num_layers),)
        message = Open(session=session, chain=chain, prompt_tokens=3, max_new_tokens=4, **fields)
        self.service.on_control(DRIVER, message)
        if held is not None and session in self.compute.owners:
            self.tell(batch.Admitted(session, held))
        await trio.testing.wait_all_tasks_blocked()

    def tell(self, *events: batch.Event) -> None:
        """Let things happen to sessions on the compute thread."""
        owned = tuple(OwnedEvent(self.compute.owners[e.session], e) for e in events)
        self.service.on_delivery(Delivery(events=owned, result=None))

    def send_prompt(self, session: SessionId = SESSION) -> InputRow:
        self.send_rows(DRIVER, Lane.PREFILL, Row(session, 0, 3))
        return self.compute.items[-1]

    def send_rows(self, sender: PeerId, lane: Lane, *rows: Row) -> None:
        count = sum(row.num_tokens for row in rows)
        payload = memoryview(np.arange(count, dtype="<i4").tobytes())
        frame = Frame(lane, tokens_shape(MODEL.manifest), Rows.of(*rows), payload)
        self.service.on_rows(sender, Arrival(frame, 0.0, 0.0))

    def finish(self, *items: InputRow, token: int = 7) -> None:
        """Let rows run; the tail samples one token after each."""
        count = len(items)
        result = make_result(items, ids=[token] * count, outputs=[1] * count)
        self.service.on_delivery(Delivery(events=(), result=result))


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
async def test_step_that_fails_ends_the_sessions_that_ran_with_its_reason() -> None:
    async with trio.open_nursery() as nursery:
        bench = Bench(nursery)
        for session in (SESSION, OTHER):
            await bench.open(session)
        item = bench.send_prompt(SESSION)
        error = InternalStepError(layers="0:2")
        events = [batch.Ended(session, error) for session in (SESSION, OTHER)]
        owned = tuple(OwnedEvent(bench.compute.owners[e.session], e) for e in events)
        result = make_result([item], error=RuntimeError("XLA"))
        bench.service.on_delivery(Delivery(events=owned, result=result))
    failed = [message for message in bench.links.control() if isinstance(message, Failed)]
    assert {message.session for message in failed} == {SESSION, OTHER}
    assert {message.code for message in failed} == {InternalStepError.code}
    assert bench.links.rows() == []
    assert bench.service.sessions == 0


@pytest.mark.trio
@pytest.mark.parametrize("error", [InvalidStep(problem="x"), QueueFull(queue="step", limit="1")])
async def test_row_that_is_not_queued_ends_its_session_and_no_other(error: PalsError) -> None:
    async with trio.open_nursery() as nursery:
        bench = Bench(nursery)
        for session in (SESSION, OTHER):
            await bench.open(session)
        bench.compute.refused_rows = error
        bench.send_rows(DRIVER, Lane.PREFILL, Row(SESSION, 0, 3))
    (failed,) = (m for m in bench.links.control() if isinstance(m, Failed))
    assert (failed.session, failed.code) == (SESSION, error.code)
    assert list(bench.compute.owners) == [OTHER]


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
    assert (bench.service.sessions, bench.compute.owners) == (0, {})


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
async def test_session_whose_early_rows_were_given_up_is_refused_and_keeps_nothing(
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
    assert (refused.code, bench.service.sessions) == (SessionRefused.code, 0)
    assert bench.compute.owners == {}
    await bench.open()
    assert bench.links.control()[1:] == [Opened(session=SESSION)]
    nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_early_rows_that_do_not_fit_their_session_end_it(nursery: trio.Nursery) -> None:
    bench = Bench(nursery)
    bench.send_rows(DRIVER, Lane.PREFILL, Row(SESSION, 1, 3))
    await bench.open()

    assert bench.compute.items == []
    assert (bench.service.sessions, bench.compute.owners) == (0, {})
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
    assert bench.service.free_tokens == FREE_TOKENS
    await bench.service.drain()
    await bench.open()

    (refused,) = bench.links.control()
    assert isinstance(refused, Refused)
    assert refused.code == ShardDraining.code
    assert bench.service.free_tokens == 0


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


# --- room ----------------------------------------------------------------------------

NAMES = b"n" * 16 + b"m" * 16


@pytest.mark.trio
async def test_session_is_asked_for_with_all_that_its_driver_said(nursery: trio.Nursery) -> None:
    bench = Bench(nursery)
    history = np.array([5, 6, 9], "<u4").tobytes()
    sampler = Sampler(top_k=3, seed=2**64 - 1, presence_penalty=0.5, history=history, answered=1)
    await bench.open(names=NAMES, replaces=bytes(OTHER), deadline_s=60.0, sampler=sampler)

    request = bench.compute.requests[SESSION]
    assert (request.session, request.peer) == (SESSION, DRIVER)
    assert (request.prompt_tokens, request.max_tokens) == (3, 7)
    assert (request.names, request.replaces) == ((b"n" * 16, b"m" * 16), OTHER)
    assert 0.0 < request.deadline < float("inf")
    sampling, counted = bench.compute.samplings[SESSION]
    assert sampling == Sampling(top_k=3, seed=2**64 - 1, presence_penalty=0.5)
    assert counted is not None
    assert (counted.tokens.tolist(), counted.answered) == ([5, 6, 9], 1)


@pytest.mark.trio
async def test_a_shard_that_is_no_tail_is_not_asked_to_sample(nursery: trio.Nursery) -> None:
    bench = Bench(nursery, stop=1)
    await bench.open()
    assert bench.compute.samplings[SESSION] == (None, None)
    assert bench.compute.requests[SESSION].deadline == float("inf")


@pytest.mark.trio
async def test_session_is_told_as_open_once_it_has_its_room_and_what_is_held(
    nursery: trio.Nursery,
) -> None:
    bench = Bench(nursery)
    await bench.open(held=None)
    assert bench.links.control() == []
    bench.tell(batch.Admitted(SESSION, 2))
    assert bench.links.control() == [Opened(session=SESSION, held=2)]


@pytest.mark.trio
@pytest.mark.parametrize("is_early", [False, True])
@pytest.mark.parametrize("stop", [1, 2])
async def test_prompt_waits_for_room_and_runs_from_where_it_begins(
    nursery: trio.Nursery, stop: int, is_early: bool
) -> None:
    bench = Bench(nursery, stop)
    if not is_early:
        await bench.open(held=None)
    bench.send_rows(DRIVER, Lane.PREFILL, Row(SESSION, 1, 1))
    bench.send_rows(DRIVER, Lane.PREFILL, Row(SESSION, 2, 1))
    if is_early:
        await bench.open(held=None)
    assert bench.compute.items == []
    bench.tell(batch.Admitted(SESSION, 2))

    assert [item.position for item in bench.compute.items] == [1, 2]
    assert [item.kind for item in bench.compute.items] == ["prefill", "prefill"]


@pytest.mark.trio
async def test_prompt_of_a_session_that_finds_no_room_goes_nowhere(nursery: trio.Nursery) -> None:
    bench = Bench(nursery)
    await bench.open(held=None)
    bench.send_rows(DRIVER, Lane.PREFILL, Row(SESSION, 0, 2))
    bench.tell(batch.Refused(SESSION, AdmissionTimeout(tokens=3, waited_s=10.0)))
    bench.send_rows(DRIVER, Lane.PREFILL, Row(SESSION, 2, 1))

    (refused,) = bench.links.control()
    assert isinstance(refused, Refused)
    assert (refused.session, refused.code) == (SESSION, AdmissionTimeout.code)
    assert (bench.compute.items, bench.service.sessions) == ([], 0)
    assert len(bench.service._early) == 0


@pytest.mark.trio
async def test_full_shard_refuses_at_once_and_forgets_the_session(nursery: trio.Nursery) -> None:
    bench = Bench(nursery)
    bench.compute.refusal = ShardFull(slots=2)
    await bench.open()
    (refused,) = bench.links.control()
    assert isinstance(refused, Refused)
    assert (refused.code, bench.service.sessions) == (ShardFull.code, 0)


@pytest.mark.trio
async def test_preempted_session_is_told_so_and_what_comes_of_it_later_is_late(
    nursery: trio.Nursery,
) -> None:
    bench = Bench(nursery)
    await bench.open()
    item = bench.send_prompt()
    bench.finish(item)
    bench.links.sent.clear()
    bench.tell(batch.Preempted(SESSION))
    bench.send_rows(LOCAL, Lane.DECODE, Row(SESSION, 3, 1))
    bench.finish(item)

    assert bench.links.control() == [Preempted(session=SESSION)]
    assert (bench.links.rows(), bench.compute.items, bench.service.sessions) == ([], [], 0)


@pytest.mark.trio
async def test_event_of_an_ended_session_is_not_its_successor_s(nursery: trio.Nursery) -> None:
    bench = Bench(nursery)
    await bench.open(held=None)
    owner = bench.compute.owners[SESSION]
    bench.service.on_control(DRIVER, Close(session=SESSION))
    await bench.open(held=None)
    for event in (batch.Admitted(SESSION, 3), batch.Preempted(SESSION)):
        bench.service.on_delivery(Delivery(events=(OwnedEvent(owner, event),), result=None))
    assert (bench.links.control(), bench.service.sessions) == ([], 1)


@pytest.mark.trio
async def test_names_of_a_closed_session_reach_its_pages(nursery: trio.Nursery) -> None:
    bench = Bench(nursery)
    await bench.open()
    bench.service.on_control(PeerId("stranger"), Close(session=SESSION, names=NAMES))
    assert bench.compute.closed == []
    bench.service.on_control(DRIVER, Close(session=SESSION, names=NAMES))
    assert bench.compute.closed == [(SESSION, (b"n" * 16, b"m" * 16))]


# --- forks, drafts, log-probabilities ------------------------------------------------------


@pytest.mark.trio
@pytest.mark.parametrize("stop", [1, 2])
async def test_first_row_of_a_fork_runs_among_those_that_decode(
    nursery: trio.Nursery, stop: int
) -> None:
    bench = Bench(nursery, stop)
    await bench.open()
    bench.send_prompt()
    bench.service.on_control(DRIVER, Fork(session=SESSION, child=OTHER, position=2))
    await trio.testing.wait_all_tasks_blocked()
    bench.send_rows(DRIVER, Lane.PREFILL, Row(OTHER, 2, 1))
    bench.tell(batch.Admitted(OTHER, 2))

    assert bench.compute.forks == [(SESSION, OTHER, 2)]
    item = bench.compute.items[-1]
    assert (item.session, item.kind, item.position) == (OTHER, "decode", 2)
    opened = [m for m in bench.links.control() if isinstance(m, Opened)]
    assert opened == [Opened(session=SESSION), Opened(session=OTHER, held=2)]
    bench.links.sent.clear()
    if stop == MODEL.num_layers:
        bench.finish(item)
        assert bench.links.rows() == [(LOCAL, Row(OTHER, 3, 1)), (DRIVER, Row(OTHER, 3, 1))]
        bench.send_rows(LOCAL, Lane.DECODE, Row(OTHER, 3, 1))
        assert bench.compute.items[-1].position == 3


@pytest.mark.trio
async def test_fork_of_a_session_of_others_is_refused(nursery: trio.Nursery) -> None:
    bench = Bench(nursery)
    await bench.open()
    bench.send_prompt()
    bench.links.sent.clear()
    bench.service.on_control(NEXT, Fork(session=SESSION, child=OTHER, position=2))
    (refused,) = bench.links.control()
    assert isinstance(refused, Refused)
    assert (refused.session, bench.compute.forks) == (OTHER, [])


@pytest.mark.trio
async def test_what_is_sampled_after_each_token_of_a_draft_goes_to_the_driver_alone(
    nursery: trio.Nursery,
) -> None:
    bench = Bench(nursery)
    await bench.open()
    bench.finish(bench.send_prompt())
    bench.links.sent.clear()
    bench.send_rows(LOCAL, Lane.DECODE, Row(SESSION, 3, 3))
    item = bench.compute.items[-1]
    assert item.kind == "verify"
    result = make_result([item], ids=[4, 5, 6])
    bench.service.on_delivery(Delivery(events=(), result=result))
    assert bench.links.rows() == [(DRIVER, Row(SESSION, 4, 3))]

    bench.send_rows(LOCAL, Lane.DECODE, Row(SESSION, 4, 1))
    assert (bench.compute.items[-1].kind, bench.compute.items[-1].position) == ("decode", 4)


@pytest.mark.trio
async def test_log_probabilities_go_to_who_asked_and_ids_round_the_ring(
    nursery: trio.Nursery,
) -> None:
    bench = Bench(nursery)
    await bench.open(sampler=Sampler(logprobs=1))
    await bench.open(OTHER)
    bench.finish(bench.send_prompt(), bench.send_prompt(OTHER), token=7)

    sent = [(peer, o.shape.kind, o) for peer, o in bench.links.sent if len(o.rows)]
    assert [(peer, kind) for peer, kind, _ in sent] == [
        (LOCAL, Kind.TOKENS),
        (DRIVER, Kind.SAMPLED),
        (DRIVER, Kind.SCORED),
    ]
    scored = sent[-1][2]
    assert scored.rows == Rows.of(Row(SESSION, 3, 1))
    (score,) = unpack_scores(LOCAL, b"".join(scored.payload))
    assert score == Score(7, -7.0, ((7, -7.0), (8, -8.0)))


@pytest.mark.trio
async def test_rows_of_several_lanes_in_one_step_leave_on_their_own(nursery: trio.Nursery) -> None:
    bench = Bench(nursery, stop=1)
    await bench.open()
    prompt = bench.send_prompt()
    bench.send_rows(NEXT, Lane.DECODE, Row(SESSION, 3, 1))
    row = bench.compute.items[-1]
    await bench.open(OTHER)
    chunk = bench.send_prompt(OTHER)
    bench.links.sent.clear()
    hidden = np.arange(16, dtype=np.float32).reshape(4, 4).astype(ml_dtypes.bfloat16)
    result = make_result([row, chunk], hidden=hidden)
    bench.service.on_delivery(Delivery(events=(), result=result))

    assert prompt.kind == "prefill"
    assert bench.links.rows() == [(NEXT, Row(SESSION, 3, 1)), (NEXT, Row(OTHER, 0, 3))]
    assert [b"".join(o.payload) for _, o in bench.links.sent] == [
        hidden[:1].tobytes(),
        hidden[1:].tobytes(),
    ]
