from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import pytest
import trio
import trio.testing

from pals.engine import batch
from pals.engine.compute import ComputeThread
from pals.engine.work import AllowedTokens, Delivery, InputRow, OwnedEvent
from pals.errors import (
    CorruptModel,
    GrammarTimeout,
    InvalidGrammar,
    InvalidStep,
    PalsError,
    SessionRefused,
)
from pals.net.control import Close, Failed, Fork, GrammarSpec, Hop, Open, Opened, Refused, Sampler
from pals.net.guiding import MASK_DEADLINE_S
from pals.net.links import Arrival, Links
from pals.net.model_shape import ModelShape
from pals.net.ring import SessionTable
from pals.net.shard_service import EXPIRY_INTERVAL_S, ShardService
from pals.net.wire import Frame, Lane, Row, Rows, tokens_shape
from pals.text.grammar import GuidedAnswer
from pals.types import EngineLimits, Grammar, LayerRange, PeerId, SessionId
from tests.unit.net.shard_fakes import DRIVER, LOCAL, FakeCompute, FakeLinks, make_result

pytestmark = pytest.mark.trio

SESSION, OTHER, CHILD = SessionId(b"s" * 16), SessionId(b"o" * 16), SessionId(b"c" * 16)
MODEL = ModelShape(manifest=b"m" * 32, num_layers=1, hidden_size=4, dtype="bf16")
GUIDED = Sampler(grammar=GrammarSpec(kind="lark", source="start: /x/"))
PROMPT_TOKENS = 3


class FakeMasks:
    """Allows the number of an answer's tokens, or does what a test says.

    Attributes:
        asked: The tokens of the answers that were looked at, in order.
        sources: And their grammars.
        failures: What is raised for a grammar's source.
        free_from: Tokens after which anything goes.
    """

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.sources: list[str] = []
        self.begun: list[GuidedAnswer] = []
        self.ended: list[GuidedAnswer] = []
        self.failures: dict[str, Exception] = {}
        self.refusal: PalsError | None = None
        self.free_from = 1000
        self.is_closed = False

    def begin(
        self, grammar: Grammar, stop_token_ids: Sequence[int], tokens: Sequence[int]
    ) -> GuidedAnswer:
        if self.refusal is not None:
            raise self.refusal
        answer = GuidedAnswer(
            key=len(self.begun),
            grammar=grammar,
            stop_token_ids=list(stop_token_ids),
            tokens=list(tokens),
        )
        self.begun.append(answer)
        return answer

    def next_mask(self, answer: GuidedAnswer) -> AllowedTokens | None:
        self.asked.append(list(answer.tokens))
        self.sources.append(answer.grammar.source)
        if (failure := self.failures.get(answer.grammar.source)) is not None:
            raise failure
        if len(answer.tokens) >= self.free_from:
            return None
        return np.array([1 << len(answer.tokens)], np.uint32)

    def end(self, answer: GuidedAnswer) -> None:
        self.ended.append(answer)

    def close(self) -> None:
        self.is_closed = True


class Bench:
    """A shard of a whole model between fakes, whose masks are found when a test says so."""

    def __init__(self, nursery: trio.Nursery, masks: FakeMasks | None) -> None:
        self.links, self.compute = FakeLinks(), FakeCompute()
        self.found = trio.Event()
        table = SessionTable(
            local=LOCAL,
            layers=LayerRange(0, 1),
            num_layers=1,
            limits=EngineLimits(max_sessions=2, max_context_tokens=32, verify_tokens=8),
            idle_s=1000.0,
        )
        links = cast("Links", self.links)
        self.service = ShardService(links, table, MODEL, nursery, masks=masks)
        self.service.attach(cast("ComputeThread", self.compute))
        self.service.guides._run_in_thread = self._find
        nursery.start_soon(self.service.guides.run)

    async def _find(self, find: Callable[[], list[Any]]) -> list[Any]:
        await self.found.wait()
        return find()

    async def find(self) -> None:
        """Let all that is looked for be found from now on."""
        self.found.set()
        await trio.testing.wait_all_tasks_blocked()

    async def open(
        self,
        session: SessionId = SESSION,
        sampler: Sampler = GUIDED,
        driver: PeerId = DRIVER,
        **fields: Any,
    ) -> None:
        message = Open(
            session=session,
            chain=(Hop(peer=LOCAL, start=0, stop=1),),
            prompt_tokens=PROMPT_TOKENS,
            max_new_tokens=5,
            sampler=sampler,
            **fields,
        )
        self.service.on_control(driver, message)
        await self._admit(session)

    async def _admit(self, session: SessionId) -> None:
        if (owner := self.compute.owners.get(session)) is not None:
            event = OwnedEvent(owner, batch.Admitted(session, 0))
            self.service.on_delivery(Delivery(events=(event,), result=None))
        await trio.testing.wait_all_tasks_blocked()

    async def send(self, lane: Lane, row: Row) -> None:
        payload = memoryview(np.arange(row.num_tokens, dtype="<i4").tobytes())
        frame = Frame(lane, tokens_shape(MODEL.manifest), Rows.of(row), payload)
        self.service.on_rows(DRIVER if lane is Lane.PREFILL else LOCAL, Arrival(frame, 0.0, 0.0))
        await trio.testing.wait_all_tasks_blocked()

    async def send_prompt(self, session: SessionId = SESSION) -> None:
        await self.send(Lane.PREFILL, Row(session, 0, PROMPT_TOKENS))

    def take(self) -> InputRow:
        """Return the one row that may run."""
        (row,) = self.compute.items
        self.compute.items.clear()
        return row

    async def finish(self, row: InputRow, token: int = 7) -> None:
        result = make_result([row], ids=[token], outputs=[1])
        self.service.on_delivery(Delivery(events=(), result=result))
        await trio.testing.wait_all_tasks_blocked()

    def failures(self) -> list[tuple[bytes, str]]:
        failed = (m for m in self.links.control() if isinstance(m, Failed))
        return [(message.session, message.code) for message in failed]


def allowed(row: InputRow) -> list[int] | None:
    return None if row.allowed is None else row.allowed.tolist()


async def test_the_prompt_waits_for_what_its_first_token_may_be(nursery: trio.Nursery) -> None:
    masks = FakeMasks()
    bench = Bench(nursery, masks)
    await bench.open(stop_token_ids=(9,))
    await bench.send_prompt()
    assert bench.compute.items == []
    await bench.find()

    row = bench.take()
    assert (allowed(row), row.kind, masks.begun[0].stop_token_ids) == ([1], "prefill", [9])
    assert bench.links.control() == [Opened(session=SESSION)]
    _, history = bench.compute.samplings[SESSION]
    assert history is not None
    assert history.is_masked
    nursery.cancel_scope.cancel()


async def test_the_parts_of_a_prompt_that_sample_nothing_do_not_wait(nursery: trio.Nursery) -> None:
    bench = Bench(nursery, FakeMasks())
    await bench.open()
    await bench.send(Lane.PREFILL, Row(SESSION, 0, 2))
    assert allowed(bench.take()) is None
    await bench.send(Lane.PREFILL, Row(SESSION, 2, 1))
    assert bench.compute.items == []
    nursery.cancel_scope.cancel()


async def test_each_token_goes_its_way_before_the_next_mask_is_looked_for(
    nursery: trio.Nursery,
) -> None:
    masks = FakeMasks()
    bench = Bench(nursery, masks)
    await bench.open()
    await bench.find()
    await bench.send_prompt()
    bench.found = trio.Event()

    await bench.finish(bench.take(), token=5)
    assert bench.links.rows() == [(LOCAL, Row(SESSION, 3, 1)), (DRIVER, Row(SESSION, 3, 1))]
    assert masks.asked == [[]]
    await bench.send(Lane.DECODE, Row(SESSION, 3, 1))
    assert bench.compute.items == []
    await bench.find()

    assert (allowed(bench.take()), masks.asked) == ([2], [[], [5]])
    nursery.cancel_scope.cancel()


async def test_a_mask_costs_no_frame_more(nursery: trio.Nursery) -> None:
    sent = []
    for sampler in (Sampler(), GUIDED):
        bench = Bench(nursery, FakeMasks())
        bench.found.set()
        await bench.open(sampler=sampler)
        await bench.send_prompt()
        for position in range(PROMPT_TOKENS, PROMPT_TOKENS + 4):
            await bench.finish(bench.take())
            await bench.send(Lane.DECODE, Row(SESSION, position, 1))
        sent.append([(peer, out.shape.kind, len(out.payload)) for peer, out in bench.links.sent])
    nursery.cancel_scope.cancel()

    assert sent[0] == sent[1]
    assert len(sent[0]) > 8


async def test_an_answer_that_goes_on_here_is_told_of_what_it_has(nursery: trio.Nursery) -> None:
    masks = FakeMasks()
    bench = Bench(nursery, masks)
    history = np.array([1, 2, 8, 9], "<u4").tobytes()
    told = Sampler(grammar=GUIDED.grammar, history=history, answered=2)
    await bench.open(sampler=told)
    await bench.find()

    assert masks.asked == [[8, 9]]
    nursery.cancel_scope.cancel()


async def test_a_fork_has_a_mask_of_its_own(nursery: trio.Nursery) -> None:
    masks = FakeMasks()
    bench = Bench(nursery, masks)
    bench.found.set()
    await bench.open()
    await bench.send_prompt()
    await bench.finish(bench.take(), token=4)
    bench.service.on_control(DRIVER, Fork(session=SESSION, child=CHILD, position=2, sampler=GUIDED))
    await trio.testing.wait_all_tasks_blocked()
    await bench.send(Lane.PREFILL, Row(CHILD, 2, 1))

    row = bench.take()
    assert (row.session, allowed(row)) == (CHILD, [1])
    assert masks.asked == [[], [4], []]
    nursery.cancel_scope.cancel()


async def test_a_grammar_that_allows_anything_in_the_end_is_asked_no_more(
    nursery: trio.Nursery,
) -> None:
    masks = FakeMasks()
    masks.free_from = 1
    bench = Bench(nursery, masks)
    bench.found.set()
    await bench.open()
    await bench.send_prompt()
    for position in (3, 4, 5):
        await bench.finish(bench.take())
        await bench.send(Lane.DECODE, Row(SESSION, position, 1))

    assert masks.asked == [[], [7]]
    nursery.cancel_scope.cancel()


# --- trouble -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidGrammar(problem="x"), InvalidGrammar.code),
        (CorruptModel(source="/home/me/tokenizer.json", problem="x"), SessionRefused.code),
        (RuntimeError("/home/me"), SessionRefused.code),
    ],
)
async def test_a_grammar_that_fails_ends_its_own_session(
    nursery: trio.Nursery, error: Exception, code: str
) -> None:
    masks = FakeMasks()
    masks.failures["bad"] = error
    bench = Bench(nursery, masks)
    bench.found.set()
    await bench.open(OTHER)
    await bench.open(sampler=Sampler(grammar=GrammarSpec(kind="lark", source="bad")))
    await bench.send_prompt(OTHER)

    assert bench.failures() == [(SESSION, code)]
    assert not any("home" in m.problem for m in bench.links.control() if isinstance(m, Failed))
    assert bench.take().session == OTHER
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("masks", [None, FakeMasks()])
async def test_a_session_whose_grammar_is_refused_holds_nothing(
    nursery: trio.Nursery, masks: FakeMasks | None
) -> None:
    if masks is not None:
        masks.refusal = InvalidGrammar(problem="x")
    bench = Bench(nursery, masks)
    await bench.open()

    (refused,) = bench.links.control()
    assert isinstance(refused, Refused)
    assert refused.code == (SessionRefused if masks is None else InvalidGrammar).code
    assert (bench.service.sessions, bench.compute.owners) == (0, {})
    nursery.cancel_scope.cancel()


async def test_a_mask_that_does_not_come_ends_its_session_in_time(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    bench = Bench(nursery, FakeMasks())
    nursery.start_soon(bench.service.expire_sessions)
    await bench.open()
    await bench.open(OTHER, Sampler())
    await bench.send_prompt()
    await trio.sleep(MASK_DEADLINE_S + 2 * EXPIRY_INTERVAL_S)

    assert bench.failures() == [(SESSION, GrammarTimeout.code)]
    assert list(bench.compute.owners) == [OTHER]
    await bench.find()
    assert bench.compute.items == []
    nursery.cancel_scope.cancel()


async def test_a_session_that_waits_for_its_driver_is_not_late(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    bench = Bench(nursery, FakeMasks())
    nursery.start_soon(bench.service.expire_sessions)
    bench.found.set()
    await bench.open()
    await trio.sleep(10 * MASK_DEADLINE_S)

    assert bench.failures() == []
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("row", [Row(SESSION, 3, 2), Row(SESSION, 2, 1)])
async def test_a_row_out_of_turn_ends_its_session(nursery: trio.Nursery, row: Row) -> None:
    bench = Bench(nursery, FakeMasks())
    bench.found.set()
    await bench.open()
    await bench.send_prompt()
    await bench.finish(bench.take())
    bench.service._table.get(SESSION).prompt_tokens = 2  # else the table would refuse it
    await bench.send(Lane.DECODE, row)

    assert bench.failures() == [(SESSION, InvalidStep.code)]
    nursery.cancel_scope.cancel()


async def test_rows_that_come_before_their_masks_do_not_pile_up(nursery: trio.Nursery) -> None:
    bench = Bench(nursery, FakeMasks())
    bench.found.set()
    await bench.open()
    await bench.send_prompt()
    bench.found = trio.Event()
    await bench.finish(bench.take())
    for _ in range(2):
        await bench.send(Lane.DECODE, Row(SESSION, 3, 1))

    assert bench.failures() == [(SESSION, InvalidStep.code)]
    nursery.cancel_scope.cancel()


async def test_a_closed_session_is_forgotten_and_its_mask_is_for_nobody(
    nursery: trio.Nursery,
) -> None:
    masks = FakeMasks()
    bench = Bench(nursery, masks)
    await bench.open()
    await bench.send_prompt()
    bench.service.on_control(DRIVER, Close(session=SESSION))
    await bench.find()

    assert (masks.ended, bench.compute.items) == (masks.begun, [])
    bench.service.guides.stop()
    assert masks.is_closed
    nursery.cancel_scope.cancel()


async def test_what_runs_goes_before_what_is_new(nursery: trio.Nursery) -> None:
    masks = FakeMasks()
    bench = Bench(nursery, masks)
    bench.found.set()
    await bench.open()
    await bench.send_prompt()
    bench.found = trio.Event()
    for letter in "abc":  # the first of them is looked at now
        sampler = Sampler(grammar=GrammarSpec(kind="lark", source=letter))
        await bench.open(SessionId(letter.encode() * 16), sampler)
    await bench.finish(bench.take(), token=6)
    await bench.find()

    assert masks.asked == [[], [], [6], [], []]
    nursery.cancel_scope.cancel()


async def test_grammars_of_one_peer_do_not_keep_those_of_another_waiting(
    nursery: trio.Nursery,
) -> None:
    masks = FakeMasks()
    bench = Bench(nursery, masks)
    other = PeerId("another driver")
    for driver, letters in ((DRIVER, "abcd"), (other, "xy")):
        for letter in letters:  # the first of them is looked at now
            sampler = Sampler(grammar=GrammarSpec(kind="lark", source=letter))
            await bench.open(SessionId(letter.encode() * 16), sampler, driver)
    await bench.find()

    assert masks.sources == list("abxcyd")
    nursery.cancel_scope.cancel()
