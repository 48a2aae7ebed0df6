"""Drivers and shards together: what is held of a prompt, who gives way, forks, deadlines."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.driver.state import SampledToken, SessionRequest
from pals.engine.batch import BatchRules
from pals.errors import DeadlineExceeded, ShardBusy
from tests.unit.driver.ring_world import (
    DECODE_S,
    DELAY_S,
    SHARDS,
    RingClient,
    expected,
    make_request,
    open_ring,
)
from tests.unit.net.virtual_ring import VirtualRing

STORY = list(range(1, 301))
OTHER_STORY = list(range(301, 501))


def prefilled(ring: VirtualRing) -> list[int]:
    """Return how many tokens of prompts each shard has computed."""
    chunks = [[s.chunk.tokens for s in c.steps if s.chunk is not None] for c in ring.computes]
    return [sum(tokens) for tokens in chunks]


# --- what is held ---------------------------------------------------------------------


@pytest.mark.trio
async def test_a_prompt_that_comes_again_is_computed_from_its_last_block_on(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_ring() as (ring, drive):
        client = drive("driver")
        first = await client.answer(make_request(STORY))
        before = prefilled(ring)
        again = await client.answer(make_request(STORY, seed=5))
        after = prefilled(ring)

    assert (first.start, again.start) == (0, 256)
    assert before == [300] * SHARDS
    assert after == [300 + 44] * SHARDS


@pytest.mark.trio
async def test_a_prompt_of_whole_blocks_that_is_held_wholly_still_makes_its_first_token(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_ring() as (_, drive):
        client = drive("driver")
        await client.answer(make_request(STORY[:128], count=70))
        again = await client.answer(make_request(STORY[:128]))
    assert again.start == 127


@pytest.mark.trio
async def test_the_next_turn_of_a_conversation_finds_prompt_and_answer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_ring() as (_, drive):
        client = drive("driver")
        turn = make_request(STORY, count=100)
        await client.answer(turn)
        following = make_request((*turn.prompt, *expected(turn), 7, 8, 9))
        reader = await client.answer(following)
    assert reader.start == 384


@pytest.mark.trio
async def test_a_chain_begins_at_the_least_of_what_its_shards_hold(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The middle shard has little room, so that another prompt takes some of the first's."""
    async with open_ring(num_pages=[64, 6, 64]) as (ring, drive):
        client = drive("driver")
        await client.answer(make_request(STORY))
        await client.answer(make_request(OTHER_STORY[:150]))
        before = prefilled(ring)
        again = await client.answer(make_request(STORY))
        after = prefilled(ring)
    assert 0 < again.start < 256
    assert again.start % 64 == 0
    assert [b - a for a, b in zip(before, after, strict=True)] == [300 - again.start] * SHARDS


@pytest.mark.trio
async def test_two_drivers_never_meet(autojump_clock: trio.testing.MockClock) -> None:
    async with open_ring() as (ring, drive):
        await drive("one").answer(make_request(STORY))
        reader = await drive("other").answer(make_request(STORY))
    assert reader.start == 0
    assert prefilled(ring) == [2 * 300] * SHARDS


@pytest.mark.trio
async def test_only_a_prompt_that_may_be_held_waits_for_the_answers(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A first time costs no round trip more than it did before there was anything to find."""
    async with open_ring() as (_, drive):
        client = drive("driver")
        times: list[float] = []
        for prompt in (STORY[:64], STORY[:64], STORY[64:128]):
            started_s = trio.current_time()
            reader = await client.answer(make_request(prompt, count=2))
            times.append(reader.times[0] - started_s)
    compute_s = SHARDS * (DECODE_S + 64 * 0.002)
    way_s = (SHARDS + 1) * DELAY_S
    assert times[0] == pytest.approx(way_s + compute_s, abs=0.001)
    assert times[2] == pytest.approx(times[0], abs=0.001)
    compute_s = SHARDS * (DECODE_S + 0.002)
    assert times[1] == pytest.approx(2 * DELAY_S + way_s + compute_s, abs=0.001)


# --- who gives way ----------------------------------------------------------------------


@pytest.mark.trio
@pytest.mark.parametrize("place", range(SHARDS))
@pytest.mark.parametrize("moment", ["prompt", "first token", "answer", "twice"])
async def test_a_preempted_session_goes_on_over_the_same_chain_as_if_nothing_had_been(
    autojump_clock: trio.testing.MockClock, place: int, moment: str
) -> None:
    async with open_ring() as (ring, drive):
        client = drive("driver")
        request = make_request(STORY, count=100, seed=3)
        at = {"prompt": (), "first token": (1,), "answer": (57,), "twice": (20, 80)}[moment]

        def preempt(count: int) -> None:
            if count in at:
                ring.computes[place].preempt(reader.id)

        reader = await client.ask(request, preempt)
        if moment == "prompt":
            await trio.sleep(0.2)
            ring.computes[place].preempt(reader.id)
        assert await reader.read() == expected(request)
        assert reader.session is not None
        assert reader.session.failures == 0
        assert client.routes._suspects._failures == {}
    replays = {"prompt": 1, "twice": 2}.get(moment, 1)
    others = [n for n in range(SHARDS) if n != place]
    chunks = prefilled(ring)
    assert all(chunks[n] <= 300 + replays * 450 for n in others)


@pytest.mark.trio
async def test_sessions_that_do_not_fit_together_give_way_and_all_end(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Shards of different sizes, which choose different sessions."""
    rules = BatchRules(max_sessions=32, decoding_s=0.5)
    async with open_ring(num_pages=[14, 10, 12], rules=rules) as (ring, drive):
        clients = [drive("one"), drive("other")]
        requests = [make_request(STORY[n : n + 100 + 20 * n], count=90, seed=n) for n in range(5)]
        async with trio.open_nursery() as nursery:
            for number, request in enumerate(requests):
                nursery.start_soon(play, clients[number % 2], 0.0, request)
    decoded = sum(len(step.rows) for step in ring.computes[1].steps)
    assert decoded < 5 * 90
    assert sum(prefilled(ring)) > SHARDS * sum(len(request.prompt) for request in requests)


@pytest.mark.trio
async def test_a_new_session_waits_for_room_and_gets_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Its prompt is on its way meanwhile, and waits where it is."""
    async with open_ring(num_pages=[8] * SHARDS) as (_, drive):
        client = drive("driver")
        first, second = make_request(STORY, count=100), make_request(OTHER_STORY, count=30)
        readers = [await client.ask(first)]
        async with trio.open_nursery() as nursery:

            async def ask_second() -> None:
                readers.append(await client.ask(second))

            nursery.start_soon(ask_second)
        assert [await reader.read() for reader in readers] == [expected(first), expected(second)]
    assert readers[1].times[0] > readers[0].times[-1]


@pytest.mark.trio
async def test_a_session_that_finds_no_room_in_time_is_refused_as_one_that_may_come_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_ring(num_pages=[8] * SHARDS) as (_, drive):
        client = drive("driver")
        long = make_request(STORY, count=212)
        reader = await client.ask(long, lambda count: None)
        assert reader.session is not None
        client.ring.computes[1]._seconds = lambda step: 1.0
        with pytest.raises(ShardBusy) as caught:
            await client.ask(make_request(OTHER_STORY))
        assert "no room for 200 tokens" in str(caught.value)
        assert await reader.read() == expected(long)


# --- forks ------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [2, 64, 65, 300])
@pytest.mark.trio
async def test_forks_answer_one_prompt_that_is_computed_once(
    autojump_clock: trio.testing.MockClock, tokens: int
) -> None:
    async with open_ring() as (ring, drive):
        client = drive("driver")
        request = make_request(STORY[:tokens], count=40, seed=1)
        parent = await client.ask(request)
        await parent.begun.wait()
        children = [await client.fork(parent, seed=seed) for seed in (1, 2, 3)]
        for seed, child in zip((1, 2, 3), children, strict=True):
            wanted = expected(make_request(STORY[:tokens], count=40, seed=seed))
            assert await child.read() == wanted
        assert await parent.read() == expected(request)
    assert prefilled(ring) == [tokens] * SHARDS


@pytest.mark.parametrize("place", range(SHARDS))
@pytest.mark.trio
async def test_a_fork_whose_room_goes_to_others_is_played_again(
    autojump_clock: trio.testing.MockClock, place: int
) -> None:
    async with open_ring() as (ring, drive):
        client = drive("driver")
        parent = await client.ask(make_request(STORY, count=60))
        await parent.begun.wait()
        child = await client.fork(parent, seed=9)
        await trio.sleep(1.0)
        ring.computes[place].preempt(child.id)
        assert await child.read() == expected(make_request(STORY, count=60, seed=9))
        assert await parent.read() == expected(make_request(STORY, count=60))


@pytest.mark.parametrize("end", ["over", "closed"])
@pytest.mark.trio
async def test_a_session_that_is_over_is_not_forked_but_found(
    autojump_clock: trio.testing.MockClock, end: str
) -> None:
    async with open_ring() as (_, drive):
        client = drive("driver")
        parent = await client.ask(make_request(STORY, count=20))
        if end == "over":
            await parent.read()
        else:
            await trio.sleep(2.0)
            assert parent.session is not None
            client.client.close(parent.session)
        child = await client.fork(parent, seed=4)
        assert await child.read() == expected(make_request(STORY, count=20, seed=4))
    assert child.start == 256


# --- what is asked for -------------------------------------------------------------------


@pytest.mark.parametrize("logprobs", [None, 0, 1, 2])
@pytest.mark.trio
async def test_log_probabilities_come_as_many_as_were_asked_for(
    autojump_clock: trio.testing.MockClock, logprobs: int | None
) -> None:
    async with open_ring() as (_, drive):
        reader = await drive("driver").answer(make_request(STORY[:5], logprobs=logprobs))
    for event in reader.events:
        assert isinstance(event, SampledToken)
        token = event.token
        tops = ((token, -token), (token + 1, -token - 1))
        assert event.logprob == (None if logprobs is None else -token)
        assert event.top == tops[: logprobs or 0]


@pytest.mark.parametrize("deadline_s", [0.5, 3.0])
@pytest.mark.trio
async def test_an_answer_that_is_not_done_in_its_time_ends_with_that(
    autojump_clock: trio.testing.MockClock, deadline_s: float
) -> None:
    async with open_ring() as (_, drive):
        client = drive("driver")
        request = make_request(STORY, count=200, deadline_s=deadline_s)
        started_s = trio.current_time()
        reader = await client.ask(request)
        with pytest.raises(DeadlineExceeded):
            await reader.read()
        took_s = trio.current_time() - started_s
        tokens = [event.token for event in reader.events if isinstance(event, SampledToken)]
    assert deadline_s <= took_s < deadline_s + 1.0
    assert tokens == expected(request)[: len(tokens)]


# --- anything ------------------------------------------------------------------------------

ASKS = st.tuples(
    st.floats(0.0, 3.0),
    st.sampled_from([STORY, OTHER_STORY]),
    st.integers(1, 200),
    st.integers(1, 40),
)
PREEMPTIONS = st.tuples(st.floats(0.0, 6.0), st.integers(0, SHARDS - 1), st.integers(0, 5))


@settings(max_examples=10)
@given(
    asks=st.lists(ASKS, min_size=1, max_size=4),
    preemptions=st.lists(PREEMPTIONS, max_size=4),
    pages=st.tuples(*[st.integers(8, 24)] * SHARDS),
)
def test_whoever_shares_a_prompt_or_gives_way_answers_as_if_alone(
    asks: list[tuple[float, list[int], int, int]],
    preemptions: list[tuple[float, int, int]],
    pages: tuple[int, ...],
) -> None:
    async def main() -> None:
        async with open_ring(num_pages=pages) as (ring, drive):
            clients = [drive("one"), drive("other")]
            async with trio.open_nursery() as nursery:
                for number, (after_s, story, tokens, count) in enumerate(asks):
                    request = make_request(story[:tokens], count=count, seed=number)
                    nursery.start_soon(play, clients[number % 2], after_s, request)
                for after_s, place, number in preemptions:
                    nursery.start_soon(take_room, ring, after_s, place, number)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def play(client: RingClient, after_s: float, request: SessionRequest) -> None:
    await trio.sleep(after_s)
    while True:
        try:
            reader = await client.ask(request)
        except ShardBusy:
            continue
        assert await reader.read() == expected(request)
        return


async def take_room(ring: VirtualRing, after_s: float, place: int, number: int) -> None:
    await trio.sleep(after_s)
    running = list(ring.computes[place].core.batcher._sessions.running)
    if running:
        ring.computes[place].preempt(running[number % len(running)])
