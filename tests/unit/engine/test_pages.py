from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pals.engine.pages import PageCopy, PageFormat, PagePool, token_bytes
from pals.engine.prefix import BLOCK_TOKENS, PrefixScope, hash_blocks
from pals.errors import InvalidConfig, PagesExhausted
from pals.types import LayerRange, PeerId, SessionId
from tests.unit.engine.page_memory import PageMemory

SCOPE = PrefixScope(manifest=b"m" * 32, layers=LayerRange(0, 4), dtype="bf16", kv_dtype="bf16")
ALICE, BOB = PeerId("12D3alice"), PeerId("12D3bob")
SALT = b"s" * 32


def make_pool(num_pages: int = 8, page_tokens: int = 16) -> PagePool:
    size = PageFormat(page_tokens=page_tokens, token_bytes=10)
    budget = (num_pages + 1) * size.page_bytes + 7
    return PagePool(size, budget_bytes=budget, scope=SCOPE)


def name(text: str) -> SessionId:
    return SessionId(text.encode().ljust(16, b"-"))


A, B, C = name("a"), name("b"), name("c")


def keys_of(pool: PagePool, tokens: list[int], driver: PeerId = ALICE) -> tuple[bytes, ...]:
    return pool.keys_of(driver, hash_blocks(SALT, tokens))


def write(pool: PagePool, session: SessionId, tokens: int) -> tuple[PageCopy, ...]:
    """Write and publish some tokens, as a step that ran does."""
    copies = pool.reserve(session, tokens)
    pool.publish(session, pool.length(session))
    return copies


def test_budget_includes_the_scratch_page() -> None:
    assert make_pool(8).num_pages == 8
    assert make_pool(8).num_tokens == 128


@pytest.mark.parametrize(("page_tokens", "budget"), [(16, 319), (17, 10000), (128, 10000)])
def test_impossible_pools_are_refused(page_tokens: int, budget: int) -> None:
    size = PageFormat(page_tokens=page_tokens, token_bytes=10)
    with pytest.raises(InvalidConfig):
        PagePool(size, budget_bytes=budget, scope=SCOPE)


def test_a_token_of_latent_attention_takes_one_array() -> None:
    grouped = [((8, 128), (8, 128))] * 4
    latent = [((1, 576),)] * 4

    assert token_bytes(grouped, element_bytes=2) == 4 * 2 * 8 * 128 * 2
    assert token_bytes(latent, element_bytes=2) == 4 * 576 * 2
    assert token_bytes(grouped, element_bytes=1, scale_bytes=2) == 4 * 2 * 8 * (128 + 2)


def test_pages_come_as_tokens_are_written_and_go_at_once() -> None:
    pool = make_pool()
    pool.open(A, ALICE)

    assert pool.reserve(A, 17) == ()
    assert (pool.available, pool.used_by(ALICE), len(pool.table(A))) == (6, 2, 2)

    pool.close(A)
    assert (pool.available, pool.used_by(ALICE)) == (8, 0)


def test_too_many_pages_are_refused_and_nothing_changes() -> None:
    pool = make_pool()
    pool.open(A, ALICE)
    pool.reserve(A, 100)

    with pytest.raises(PagesExhausted) as caught:
        pool.reserve(A, 29)

    assert caught.value.fields == {"pages": 2, "available": 1}
    assert pool.length(A) == 100
    assert pool.tokens_within(A, pool.available) == 28
    pool.reserve(A, 28)


def test_published_prompt_is_held_for_the_same_driver_only() -> None:
    pool = make_pool()
    prompt = [7] * BLOCK_TOKENS
    pool.open(A, ALICE, keys_of(pool, prompt))
    write(pool, A, 70)

    assert pool.open(B, ALICE, keys_of(pool, prompt)) == BLOCK_TOKENS
    assert pool.open(C, BOB, keys_of(pool, prompt, BOB)) == 0
    assert pool.table(B) == pool.table(A)[:4]
    assert pool.used_by(ALICE) == 5


def test_a_prompt_is_not_held_before_it_is_written() -> None:
    pool = make_pool()
    keys = keys_of(pool, [7] * BLOCK_TOKENS)
    pool.open(A, ALICE, keys)
    pool.reserve(A, 64)

    assert pool.match(keys).tokens == 0
    pool.publish(A, 40)
    assert pool.match(keys).tokens == 32


def test_closed_prompt_stays_until_its_room_is_needed_the_end_of_it_first() -> None:
    pool = make_pool()
    keys = keys_of(pool, [7] * BLOCK_TOKENS)
    pool.open(A, ALICE, keys)
    write(pool, A, 64)
    pool.close(A)
    assert (pool.available, pool.idle, pool.used_by(ALICE)) == (8, 4, 0)

    pool.open(B, BOB)
    pool.reserve(B, 6 * 16)

    match = pool.match(keys)
    assert (match.tokens, match.idle) == (32, 2)


def test_least_recently_used_prompt_goes_first() -> None:
    pool = make_pool()
    old, new = keys_of(pool, [1] * 64), keys_of(pool, [2] * 64)
    for session, keys in ((A, old), (B, new)):
        pool.open(session, ALICE, keys)
        write(pool, session, 64)
        pool.close(session)
    pool.open(A, ALICE, old)
    pool.close(A)

    pool.open(C, BOB)
    pool.reserve(C, 64)

    assert (pool.match(old).tokens, pool.match(new).tokens) == (64, 0)


def test_fork_shares_pages_and_copies_the_one_that_it_writes_to() -> None:
    pool = make_pool()
    pool.open(A, ALICE)
    pool.reserve(A, 20)
    before = pool.table(A)

    pool.fork(A, B, 20)
    assert pool.table(B) == before

    (copy,) = pool.reserve(B, 1)
    assert copy.source == before[1]
    assert list(pool.table(B)) == [before[0], copy.target]
    assert pool.reserve(A, 1) == ()  # nobody else has its page any more
    assert pool.table(A) == before


def test_fork_on_the_edge_of_a_page_copies_nothing() -> None:
    pool = make_pool()
    pool.open(A, ALICE)
    pool.reserve(A, 40)
    pool.fork(A, B, 32)

    assert pool.reserve(B, 1) == ()
    assert pool.table(B)[:2] == pool.table(A)[:2]


def test_whole_prompt_that_is_held_is_not_copied_for_its_last_token_unless_shared() -> None:
    pool = make_pool()
    keys = keys_of(pool, [7] * 64)
    pool.open(A, ALICE, keys)
    write(pool, A, 64)
    pool.close(A)

    pool.open(B, ALICE, keys)
    pool.start(B, 63)
    assert write(pool, B, 1) == ()
    assert pool.match(keys).tokens == 64

    pool.open(C, ALICE, keys)
    pool.start(C, 63)
    assert len(write(pool, C, 1)) == 1
    # What it computed again is the same, so it goes back to the page of the others.
    assert pool.table(C) == pool.table(B)
    assert pool.used_by(ALICE) == 4


def test_rewind_frees_pages_and_forgets_their_names() -> None:
    pool = make_pool()
    keys = keys_of(pool, [7] * 64)
    pool.open(A, ALICE, keys)
    pool.reserve(A, 64)

    pool.rewind(A, 17)
    assert (pool.length(A), len(pool.table(A)), pool.available) == (17, 2, 6)

    write(pool, A, 47)
    assert pool.match(keys).tokens == 16


def test_page_whose_tokens_change_is_not_found_any_more() -> None:
    pool = make_pool()
    keys = keys_of(pool, [7] * 64)
    pool.open(A, ALICE, keys)
    write(pool, A, 64)

    pool.rewind(A, 40)
    write(pool, A, 24)

    assert pool.match(keys).tokens == 32


def test_answer_is_found_once_its_blocks_are_named() -> None:
    pool = make_pool()
    history = [7] * 64
    pool.open(A, ALICE)
    pool.reserve(A, 64)
    pool.name(A, keys_of(pool, history))
    pool.publish(A, 64)
    pool.close(A)

    assert pool.open(B, ALICE, keys_of(pool, history)) == 64


def test_equal_prompts_computed_side_by_side_end_in_the_same_pages() -> None:
    pool = make_pool()
    keys = keys_of(pool, [7] * 64)
    for session in (A, B):
        pool.open(session, ALICE, keys)
        pool.reserve(session, 64)
    assert pool.available == 0

    for session in (A, B):
        pool.publish(session, 64)

    assert pool.table(A) == pool.table(B)
    assert pool.available == 4


# --- against a model -----------------------------------------------------------------

DRIVERS = (ALICE, BOB)
PROMPTS = [[n] * 64 + [n + 1] * 64 for n in range(2)] + [[0] * 200]
NUM_PAGES = 24


@dataclass
class Modelled:
    """What a session should see."""

    driver: PeerId
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)


class PoolAgainstLists(RuleBasedStateMachine):
    """Sessions write, fork, rewind and close; each always reads its own tokens."""

    @initialize(page_tokens=st.sampled_from([16, 32, 64]))
    def begin(self, page_tokens: int) -> None:
        self.pool = make_pool(NUM_PAGES * 16 // page_tokens, page_tokens)
        self.memory = PageMemory(self.pool.num_pages, page_tokens)
        self.sessions: dict[SessionId, Modelled] = {}
        self.ever: dict[PeerId, list[list[int]]] = {driver: [] for driver in DRIVERS}
        self.count = 0

    def new_id(self) -> SessionId:
        self.count += 1
        return name(str(self.count))

    def pick(self, number: int) -> SessionId:
        return sorted(self.sessions)[number % len(self.sessions)]

    @rule(driver=st.sampled_from(DRIVERS), prompt=st.sampled_from(PROMPTS), cut=st.integers(0, 80))
    def open(self, driver: PeerId, prompt: list[int], cut: int) -> None:
        session = self.new_id()
        keys = keys_of(self.pool, prompt, driver)
        match = self.pool.match(keys)
        available = self.pool.available
        held = self.pool.open(session, driver, keys)
        assert held == match.tokens
        assert self.pool.available == available - match.idle
        # It was written by the same driver, from its first token on.
        assert held == 0 or any(h[:held] == prompt[:held] for h in self.ever[driver])
        start = max(0, held - cut)
        self.pool.start(session, start)
        self.sessions[session] = Modelled(driver, prompt, prompt[:start])

    @precondition(lambda self: self.sessions)
    @rule(number=st.integers(0, 9), count=st.integers(1, 70), draft=st.booleans())
    def write(self, number: int, count: int, draft: bool) -> None:
        session = self.pick(number)
        model = self.sessions[session]
        start = len(model.tokens)
        news = model.prompt[start : start + count]
        if draft or len(news) < count:
            news = [self.count * 1000 + i for i in range(count)]
            self.pool.rewind(session, start)  # these are no tokens that it has names for
            model.prompt = model.tokens.copy()
        self.step(session, news)

    def step(self, session: SessionId, news: list[int]) -> None:
        model = self.sessions[session]
        needed, available = self.pool.pages_needed(session, len(news)), self.pool.available
        within = self.pool.tokens_within(session, available)
        assert (len(news) <= within) == (needed <= available)
        if needed > available:
            with pytest.raises(PagesExhausted):
                self.pool.reserve(session, len(news))
            return
        copies = self.pool.reserve(session, len(news))
        assert self.pool.available == available - needed + self.freed_by(copies)
        self.memory.copy(copies)
        self.memory.write(self.pool.table(session), len(model.tokens), news)
        model.tokens = model.tokens + news
        self.ever[model.driver].append(list(model.tokens))
        self.pool.publish(session, len(model.tokens))

    def freed_by(self, copies: tuple[PageCopy, ...]) -> int:
        tables = [page for s in self.sessions for page in self.pool.table(s)]
        return sum(copy.source not in tables for copy in copies)

    @precondition(lambda self: self.sessions)
    @rule(number=st.integers(0, 9), back=st.integers(0, 40))
    def rewind(self, number: int, back: int) -> None:
        session = self.pick(number)
        model = self.sessions[session]
        position = max(0, len(model.tokens) - back)
        self.pool.rewind(session, position)
        model.tokens = model.tokens[:position]
        model.prompt = model.tokens.copy()

    @precondition(lambda self: self.sessions)
    @rule(number=st.integers(0, 9), back=st.integers(0, 40))
    def fork(self, number: int, back: int) -> None:
        parent, child = self.pick(number), self.new_id()
        model = self.sessions[parent]
        position = max(0, len(model.tokens) - back)
        available = self.pool.available
        self.pool.fork(parent, child, position)
        assert self.pool.available == available
        self.sessions[child] = Modelled(
            model.driver, model.tokens[:position], model.tokens[:position]
        )

    @rule()
    def ask_for_every_prompt(self) -> None:
        for driver in DRIVERS:
            for prompt in PROMPTS:
                session = self.new_id()
                held = self.pool.open(session, driver, keys_of(self.pool, prompt, driver))
                assert self.memory.read(self.pool.table(session), held) == prompt[:held]
                self.pool.close(session)

    @precondition(lambda self: self.sessions)
    @rule(number=st.integers(0, 9), named=st.booleans())
    def close(self, number: int, named: bool) -> None:
        session = self.pick(number)
        model = self.sessions.pop(session)
        if named:
            self.pool.name(session, keys_of(self.pool, model.tokens, model.driver))
            self.pool.publish(session, len(model.tokens))
        self.pool.close(session)

    @rule()
    def fail(self) -> None:
        if self.count % 7 == 0:
            self.pool.clear()
            self.sessions.clear()

    @invariant()
    def every_session_reads_its_own_tokens(self) -> None:
        for session, model in getattr(self, "sessions", {}).items():
            assert self.pool.length(session) == len(model.tokens)
            table = self.pool.table(session)
            assert self.memory.read(table, len(model.tokens)) == model.tokens

    @invariant()
    def every_page_is_somewhere_and_never_with_two_drivers(self) -> None:
        if not hasattr(self, "pool"):
            return
        owners: dict[int, set[PeerId]] = {}
        for session, model in self.sessions.items():
            table = self.pool.table(session)
            assert len(set(table)) == len(table)
            assert len(table) == self.pool.format.pages_of(len(model.tokens))
            for page in table:
                assert 1 <= page <= self.pool.num_pages
                owners.setdefault(page, set()).add(model.driver)
        assert all(len(drivers) == 1 for drivers in owners.values())
        assert len(owners) + self.pool.available == self.pool.num_pages
        used = Counter(next(iter(drivers)) for drivers in owners.values())
        assert all(self.pool.used_by(driver) == used[driver] for driver in DRIVERS)

    def teardown(self) -> None:
        for session in getattr(self, "sessions", {}):
            self.pool.close(session)
        if hasattr(self, "pool"):
            assert self.pool.available == self.pool.num_pages


TestPool = PoolAgainstLists.TestCase
TestPool.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
