from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

from pals.driver.recovery import Patience
from pals.driver.routes import RouteTable, ServedModel
from pals.driver.sessions import SessionClient
from pals.driver.state import SampledToken, SessionEvent, SessionRequest
from pals.errors import (
    AdmissionTimeout,
    GrammarTimeout,
    InvalidFrame,
    InvalidGrammar,
    LinkRefused,
    NoChain,
    PalsError,
    PeerSessionsFull,
    PeerUnreachable,
    QueueFull,
    SessionRefused,
    SessionTooLong,
    ShardBusy,
    ShardFull,
    WireVersionMismatch,
)
from pals.net.announce import Announcement
from pals.net.control import (
    MAX_HISTORY_TOKENS,
    Ack,
    Close,
    Failed,
    GrammarSpec,
    Open,
    Opened,
    Refused,
    Stats,
    StatsRequest,
    answer_of,
    decode_control,
    history_of,
)
from pals.net.links import Arrival
from pals.net.scores import pack_scores
from pals.net.wire import (
    FLAG_LAST,
    Frame,
    Lane,
    Outgoing,
    Row,
    Rows,
    buffer_of,
    pooled_shape,
    sampled_shape,
    scored_shape,
)
from pals.types import MAX_GRAMMAR_BYTES, Grammar, LayerRange, PeerId, Sampling, SessionId

pytestmark = pytest.mark.trio

MANIFEST = b"m" * 32
MODEL = ServedModel(
    model_id="test/m", manifest=MANIFEST, num_layers=4, max_position_embeddings=64, hidden_size=8
)
GRAMMAR = Grammar(kind="lark", source="start: /x/")
A, B, C, D = (PeerId(f"12D3KooW{name}-abcdefgh") for name in "ABCD")


def announcement(peer: PeerId, layers: str, *, free: int = 2) -> Announcement:
    return Announcement(
        peer=peer,
        model_id="test/m",
        manifest=MANIFEST,
        layers=LayerRange.parse(layers),
        num_layers=4,
        layer_hashes=(bytes(16),) * len(LayerRange.parse(layers)),
        dtype="f32",
        free_tokens=free,
        max_context_tokens=32,
        step_ms=1.0,
        addresses=("/ip4/127.0.0.1/tcp/1",),
        seq=1,
        expires_at=time.time() + 60,
    )


class FakeDiscovery:
    """Lists what was announced when the driver came; a look-up finds what came since."""

    def __init__(self, announcements: Iterable[Announcement]) -> None:
        self.announced = {a.peer: a for a in announcements}
        self._listed = dict(self.announced)

    def announcements(self) -> dict[PeerId, Announcement]:
        return self._listed

    def report_lost(self, peer: PeerId) -> None:
        assert peer in self.announced

    def last_seq(self, peer: PeerId) -> int:
        return self.announced[peer].seq if peer in self.announced else -1

    async def find(self, peers: Iterable[PeerId], *, deadline_s: float) -> dict[PeerId, Any]:
        assert deadline_s > 0
        self._listed = {p: a for p, a in self.announced.items() if p in set(peers)}
        return self._listed


class FakeLinks:
    """Answers `Open` at once, as the shards of a test would."""

    def __init__(self) -> None:
        self.unreachable: dict[PeerId, PalsError] = {}
        self.refusals: dict[PeerId, tuple[str, str]] = {}
        self.silent: set[PeerId] = set()
        self.opened: list[tuple[PeerId, ...]] = []
        self.asked: list[tuple[PeerId, Open]] = []
        self.closed: list[PeerId] = []
        self.client: SessionClient | None = None
        self.on_refusal: Callable[[PeerId, object], None] = lambda *_: None
        self.prompted: list[tuple[PeerId, SessionId]] = []
        self.acknowledged: list[int] = []
        self.late: list[tuple[PeerId, Any]] | None = None

    async def ensure(self, peer: PeerId, addresses: Sequence[str]) -> None:
        await trio.lowlevel.checkpoint()
        if peer in self.unreachable:
            raise self.unreachable[peer]

    def send(self, peer: PeerId, lane: Lane, outgoing: Outgoing) -> None:
        assert self.client is not None
        if lane is Lane.PREFILL:
            self.prompted.append((peer, outgoing.rows.sessions[0]))
        if lane is not Lane.CONTROL or peer in self.silent:
            return
        message = decode_control(peer, memoryview(b"".join(outgoing.payload)))
        if isinstance(message, Open):
            self.asked.append((peer, message))
            if peer == message.chain[0].peer:
                self.opened.append(tuple(PeerId(hop.peer) for hop in message.chain))
            if peer in self.refusals:
                code, problem = self.refusals[peer]
                answer: Any = Refused(session=message.session, code=code, problem=problem)
                self.on_refusal(peer, answer)
            else:
                answer = Opened(session=message.session)
            if self.late is None:
                self.client.on_control(peer, answer)
            else:
                self.late.append((peer, answer))
        elif isinstance(message, StatsRequest):
            parts = {"queue_ms": 0.0, "handover_ms": 0.0, "codec_ms": 0.0, "turn_ms": 3.0}
            stats = Stats(steps=1, step_ms=1.0, **parts)
            self.client.on_control(peer, stats)
        elif isinstance(message, Close):
            self.closed.append(peer)
        elif isinstance(message, Ack):
            self.acknowledged.append(message.position)

    def answer(self) -> None:
        """Let the answers come that were held back."""
        assert self.client is not None
        late, self.late = self.late, None
        for peer, answer in late or ():
            self.client.on_control(peer, answer)


class FakeNode:
    peer_id = PeerId("12D3KooWself-abcdefgh")

    def __init__(self, *announcements: Announcement) -> None:
        self.discovery = FakeDiscovery(announcements)
        self.links = FakeLinks()

    def members(self) -> frozenset[PeerId]:
        return frozenset({A, B, C, D, self.peer_id})

    async def meet_more(self) -> None:
        await trio.lowlevel.checkpoint()


class Bench:
    def __init__(self, nursery: trio.Nursery, *announcements: Announcement) -> None:
        self.node: Any = FakeNode(*announcements)
        self.links: FakeLinks = self.node.links
        self.routes = RouteTable(self.node, MODEL)
        patience = Patience(wait_for_peers_s=0.0)
        self.client = SessionClient(
            self.node, MODEL, self.routes, nursery=nursery, patience=patience
        )
        self.links.client = self.client
        self.events: list[SessionEvent] = []

    async def open(
        self, count: int = 3, sampling: Sampling | None = None, grammar: Grammar | None = None
    ):
        request = SessionRequest(
            prompt=(1, 2),
            max_new_tokens=count,
            stop_token_ids=(),
            sampling=sampling or Sampling(),
            grammar=grammar,
        )
        return await self.client.open(request, self.events.append)

    def sample(self, peer: PeerId, session: SessionId, position: int, *, flags: int = 0) -> None:
        payload = memoryview(np.array([7], "<i4").tobytes())
        rows = Rows.of(Row(session, position, 1, flags))
        frame = Frame(Lane.DECODE, sampled_shape(MANIFEST, 4), rows, payload)
        self.client.on_rows(peer, Arrival(frame, 0.0, 0.0))

    def pool(self, peer: PeerId, session: SessionId, mean: Sequence[float]) -> None:
        payload = memoryview(np.array(mean, "<f4").tobytes())
        rows = Rows.of(Row(session, 2, 1, FLAG_LAST))
        frame = Frame(Lane.DECODE, pooled_shape(MANIFEST, 4, 8), rows, payload)
        self.client.on_rows(peer, Arrival(frame, 0.0, 0.0))

    def score(self, peer: PeerId, session: SessionId, position: int) -> None:
        ids, logprobs = np.array([[7, 8, 9]]), np.array([[-0.5, -1.0, -1.5]], np.float32)
        words = pack_scores(ids[:, 0], logprobs[:, 0], ids, logprobs)
        rows = Rows.of(Row(session, position, 1))
        frame = Frame(Lane.DECODE, scored_shape(MANIFEST, 4), rows, buffer_of(words))
        self.client.on_rows(peer, Arrival(frame, 0.0, 0.0))


async def test_a_tail_that_never_stops_is_stopped_at_the_last_token_asked_for(
    nursery: trio.Nursery,
) -> None:
    bench = Bench(nursery, announcement(A, "0:4"))
    session = await bench.open(count=3)

    for position in range(2, 12):
        bench.sample(A, session.attempt.session, position)

    assert bench.events == [SampledToken(7, False), SampledToken(7, False), SampledToken(7, True)]
    assert bench.links.closed == [A]


async def test_the_tail_s_own_end_frees_the_session_at_once(nursery: trio.Nursery) -> None:
    bench = Bench(nursery, announcement(A, "0:2"), announcement(B, "2:4"))
    session = await bench.open(count=9)

    bench.sample(B, session.attempt.session, 2, flags=FLAG_LAST)

    assert bench.events == [SampledToken(7, True)]
    assert sorted(bench.links.closed) == [A, B]


async def test_tokens_from_another_peer_or_position_are_refused(nursery: trio.Nursery) -> None:
    bench = Bench(nursery, announcement(A, "0:2"), announcement(B, "2:4"))
    session = await bench.open()

    with pytest.raises(InvalidFrame):
        bench.sample(A, session.attempt.session, 2)
    with pytest.raises(InvalidFrame):
        bench.sample(B, session.attempt.session, 3)
    assert bench.events == []


async def test_a_row_of_several_sampled_tokens_is_refused(nursery: trio.Nursery) -> None:
    bench = Bench(nursery, announcement(A, "0:4"))
    session = await bench.open()
    payload = memoryview(np.array([7, 8], "<i4").tobytes())
    frame = Frame(
        Lane.DECODE,
        sampled_shape(MANIFEST, 4),
        Rows.of(Row(session.attempt.session, 2, 2)),
        payload,
    )

    with pytest.raises(InvalidFrame):
        bench.client.on_rows(A, Arrival(frame, 0.0, 0.0))


async def test_scored_tokens_have_as_many_alternatives_as_were_asked_for(
    nursery: trio.Nursery,
) -> None:
    bench = Bench(nursery, announcement(A, "0:4"))
    session = await bench.open(sampling=Sampling(logprobs=2))
    bench.score(A, session.attempt.session, 2)
    assert bench.events == [SampledToken(7, False, -0.5, ((7, -0.5), (8, -1.0)))]


@pytest.mark.parametrize("logprobs", [None, 2])
async def test_tokens_of_the_other_kind_than_asked_for_are_refused(
    nursery: trio.Nursery, logprobs: int | None
) -> None:
    bench = Bench(nursery, announcement(A, "0:4"))
    session = await bench.open(sampling=Sampling(logprobs=logprobs))
    give = bench.score if logprobs is None else bench.sample
    with pytest.raises(InvalidFrame):
        give(A, session.attempt.session, 2)
    assert bench.events == []


async def test_an_embedding_is_what_the_tail_made_of_the_whole_prompt(
    nursery: trio.Nursery,
) -> None:
    bench = Bench(nursery, announcement(A, "0:2"), announcement(B, "2:4"))
    found: list[object] = []

    async def embed() -> None:
        found.append(await bench.client.embed((1, 2)))

    nursery.start_soon(embed)
    await trio.testing.wait_all_tasks_blocked()
    (tail,) = [message for peer, message in bench.links.asked if peer == B]
    assert tail.sampler is not None
    assert tail.sampler.pooling
    assert not tail.names, "what is held already would not be pooled"
    bench.pool(B, SessionId(tail.session), [1.0] * 8)
    await trio.testing.wait_all_tasks_blocked()

    np.testing.assert_array_equal(found, [[1.0] * 8])
    assert sorted(bench.links.closed) == [A, B]


async def test_an_embedding_is_taken_where_one_was_asked_for_and_of_numbers(
    nursery: trio.Nursery,
) -> None:
    bench = Bench(nursery, announcement(A, "0:4"))
    answer = await bench.open()
    pooled = await bench.open(sampling=Sampling(pooling=True))

    with pytest.raises(InvalidFrame, match="asked for"):
        bench.pool(A, answer.attempt.session, [1.0] * 8)
    with pytest.raises(InvalidFrame, match="asked for"):
        bench.sample(A, pooled.attempt.session, 2)
    with pytest.raises(InvalidFrame, match="not of numbers"):
        bench.pool(A, pooled.attempt.session, [float("nan")] * 8)


async def test_only_the_tail_is_told_how_to_sample_and_what_penalties_count(
    nursery: trio.Nursery,
) -> None:
    bench = Bench(nursery, announcement(A, "0:2"), announcement(B, "2:4"))
    await bench.open(sampling=Sampling(temperature=0.5, frequency_penalty=0.1))
    told = {peer: message.sampler for peer, message in bench.links.asked}
    assert told[A] is None
    assert told[B] is not None
    assert told[B].to_sampling() == Sampling(temperature=0.5, frequency_penalty=0.1)
    assert (history_of(told[B]).tolist(), told[B].answered) == ([1, 2], 0)


async def test_only_the_tail_is_told_the_grammar_and_the_answer_that_it_goes_on_behind(
    nursery: trio.Nursery,
) -> None:
    bench = Bench(nursery, announcement(A, "0:2"), announcement(B, "2:4"))
    session = await bench.open(grammar=GRAMMAR)
    told = {peer: message.sampler for peer, message in bench.links.asked}
    assert told[A] is None
    assert told[B] is not None
    assert told[B].grammar == GrammarSpec.of(GRAMMAR)
    assert (told[B].history, told[B].answered) == (b"", 0)

    bench.sample(B, session.attempt.session, 2)
    assert answer_of(session.build_sampler()) == [7]
    session.tokens = [7] * (MAX_HISTORY_TOKENS + 1)
    with pytest.raises(InvalidGrammar, match="cannot go on"):
        session.build_sampler()


async def test_a_grammar_that_no_shard_takes_is_refused_before_one_is_asked(
    nursery: trio.Nursery,
) -> None:
    bench = Bench(nursery, announcement(A, "0:4"))
    with pytest.raises(InvalidGrammar, match=str(MAX_GRAMMAR_BYTES)):
        await bench.open(grammar=Grammar(kind="lark", source="é" * MAX_GRAMMAR_BYTES))
    assert bench.links.asked == []


@pytest.mark.parametrize(
    ("code", "error"),
    [(InvalidGrammar.code, InvalidGrammar), (GrammarTimeout.code, GrammarTimeout)],
)
async def test_a_grammar_that_a_tail_cannot_enforce_ends_the_session_and_blames_nobody(
    nursery: trio.Nursery, code: str, error: type[PalsError]
) -> None:
    bench = Bench(nursery, announcement(A, "0:4"), announcement(C, "0:4"))
    session = await bench.open(grammar=GRAMMAR)
    tail = session.chain.tail.peer
    bench.client.on_control(
        tail, Failed(session=session.attempt.session, code=code, problem="too large")
    )
    await trio.testing.wait_all_tasks_blocked()

    (event,) = bench.events
    assert isinstance(event, error)
    assert len(bench.links.asked) == 1


@pytest.mark.parametrize("grammar", [GRAMMAR, None], ids=["guided", "free"])
async def test_what_others_than_the_tail_of_a_guided_session_say_of_grammars_moves_it(
    nursery: trio.Nursery, grammar: Grammar | None
) -> None:
    heads, tails = (
        (announcement(p, "0:2") for p in (A, C)),
        (announcement(p, "2:4") for p in (B, D)),
    )
    bench = Bench(nursery, *heads, *tails)
    session = await bench.open(grammar=grammar)
    liar = session.chain.head.peer if grammar else session.chain.tail.peer
    failed = Failed(session=session.attempt.session, code=InvalidGrammar.code, problem="x")
    bench.client.on_control(liar, failed)
    await trio.testing.wait_all_tasks_blocked()

    assert not any(isinstance(event, InvalidGrammar) for event in bench.events)


async def test_without_penalties_nobody_is_told_the_prompt(nursery: trio.Nursery) -> None:
    bench = Bench(nursery, announcement(A, "0:4"))
    await bench.open(sampling=Sampling(temperature=0.5, logit_bias=((1, 2.0),)))
    ((_, message),) = bench.links.asked
    assert message.sampler is not None
    assert message.sampler.history == b""


@pytest.mark.parametrize(
    "error", [ShardFull, AdmissionTimeout, PeerSessionsFull, QueueFull], ids=lambda e: e.code
)
async def test_any_want_of_room_sends_a_request_elsewhere_or_back_to_its_caller(
    nursery: trio.Nursery, error: type[PalsError]
) -> None:
    bench = Bench(nursery, announcement(A, "0:4"), announcement(B, "0:4"))
    bench.links.refusals = {A: (error.code, "no room")}
    assert (await bench.open()).attempt.peers == {B}
    bench.links.refusals[B] = bench.links.refusals[A]
    with pytest.raises(ShardBusy):
        await bench.open()


async def test_a_session_that_no_shard_could_hold_is_refused_for_good(
    nursery: trio.Nursery,
) -> None:
    bench = Bench(nursery, announcement(A, "0:4"))
    bench.links.refusals = {A: (SessionTooLong.code, "5 tokens, the shard holds 4 in all")}
    with pytest.raises(SessionRefused):
        await bench.open()


@pytest.mark.parametrize("is_last", [False, True])
async def test_tokens_before_the_last_answer_wait_for_it_and_are_acknowledged_then(
    nursery: trio.Nursery, is_last: bool
) -> None:
    bench = Bench(nursery, announcement(A, "0:2"), announcement(B, "2:4"))
    bench.links.late = []
    async with trio.open_nursery() as opening:
        opening.start_soon(bench.open, 20)
        await trio.testing.wait_all_tasks_blocked()
        ((head, session),) = bench.links.prompted
        assert (head, len(bench.links.late)) == (A, 2)
        for position in range(2, 19):
            bench.sample(B, session, position)
        bench.sample(B, session, 19, flags=FLAG_LAST if is_last else 0)
        assert (bench.events, bench.links.acknowledged) == ([], [])
        bench.links.answer()

    tokens = [SampledToken(7, False)] * 17 + [SampledToken(7, is_last)]
    assert bench.events == tokens
    assert bench.links.acknowledged != []
    assert sorted(bench.links.closed) == ([A, B] if is_last else [])


async def test_tokens_of_a_chain_that_does_not_hold_are_nobody_s(nursery: trio.Nursery) -> None:
    bench = Bench(nursery, announcement(A, "0:2"), announcement(B, "2:4"))
    bench.node.discovery.announced[C] = announcement(C, "0:2")
    bench.links.late = []
    bench.links.refusals[A] = ShardFull.code, "full"
    async with trio.open_nursery() as opening:
        opening.start_soon(bench.open)
        await trio.testing.wait_all_tasks_blocked()
        ((_, session),) = bench.links.prompted
        bench.sample(B, session, 2)
        bench.node.discovery._listed = bench.node.discovery.announced
        bench.links.answer()

    assert bench.events == []
    assert bench.links.opened[-1] == (C, B)
    assert [head for head, _ in bench.links.prompted] == [A, C]


async def test_another_chain_is_taken_when_a_shard_cannot_be_reached(nursery: trio.Nursery) -> None:
    bench = Bench(nursery, announcement(A, "0:4"), announcement(B, "0:2"), announcement(C, "2:4"))
    bench.links.unreachable[A] = PeerUnreachable(peer=A, problem="gone")

    session = await bench.open()

    assert session.attempt.peers == {B, C}


async def test_without_another_chain_an_unreachable_shard_is_told_as_missing_layers(
    nursery: trio.Nursery,
) -> None:
    bench = Bench(nursery, announcement(A, "0:2"), announcement(B, "2:4"))
    bench.links.unreachable[B] = PeerUnreachable(peer=B, problem="gone")

    with pytest.raises(NoChain) as caught:
        await bench.open()

    assert caught.value.fields["missing"] == "2:4"


@pytest.mark.parametrize(
    "error",
    [
        WireVersionMismatch(peer=A, theirs=2, ours=1),
        LinkRefused(peer=A, problem="the swarm secrets differ"),
    ],
)
async def test_without_another_chain_the_reason_of_the_last_one_is_told(
    error: PalsError, nursery: trio.Nursery
) -> None:
    bench = Bench(nursery, announcement(A, "0:4"))
    bench.links.unreachable[A] = error

    with pytest.raises(type(error)):
        await bench.open()


async def test_a_full_shard_is_passed_over_and_told_when_there_is_no_other(
    nursery: trio.Nursery,
) -> None:
    bench = Bench(nursery, announcement(A, "0:4"), announcement(B, "0:4"))
    bench.links.refusals = {A: (ShardFull.code, "all 2 session slots are taken")}
    assert (await bench.open()).attempt.peers == {B}

    bench.links.refusals[B] = bench.links.refusals[A]
    with pytest.raises(ShardBusy) as caught:
        await bench.open()

    assert (caught.value.http_status, caught.value.retryable) == (429, True)


async def test_a_peer_that_came_back_with_other_layers_is_asked_for_these(
    nursery: trio.Nursery,
) -> None:
    bench = Bench(nursery, announcement(A, "0:2"), announcement(B, "2:4"))
    await bench.routes.refresh()
    bench.links.refusals[A] = ("PALS-SESSION-REFUSED", "the chain does not hold these layers")
    bench.node.discovery.announced[A] = announcement(A, "0:4")

    def forgive(_: PeerId, __: object) -> None:
        bench.links.refusals.clear()

    bench.links.on_refusal = forgive
    session = await bench.open()

    assert [str(hop.layers) for hop in session.chain.hops] == ["0:4"]


async def test_reports_asked_for_together_are_each_whole(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    bench = Bench(nursery, announcement(A, "0:2"), announcement(B, "2:4"))
    await bench.open()
    reports: list[int] = []

    async def report() -> None:
        reports.append(len(await bench.client.report()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(report)
        nursery.start_soon(report)

    assert reports == [2, 2]
