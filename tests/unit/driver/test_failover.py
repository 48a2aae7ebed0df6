"""What a session's reader sees when shards die, leave or fall silent: a pause, no seam."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import trio
import trio.testing

from pals.driver.recovery import MAX_FAILURES, MAX_PREEMPTIONS, Patience
from pals.errors import NoChain, PalsError, SessionPreempted, ShardBusy, StepTimeout
from pals.types import PeerId
from tests.unit.driver.virtual_shards import (
    RANGES,
    STEP_S,
    VirtualShards,
    World,
    make_request,
    open_world,
    peer,
    unfailed,
)

pytestmark = pytest.mark.trio

RECOVERY_S = 5.0
"""The promise: the longest silence with a spare shard."""

SIGNS: dict[str, Callable[[VirtualShards, PeerId], None]] = {
    "reset": VirtualShards.kill,
    "reported": partial(VirtualShards.kill, told_first=True),
    "silent": lambda shards, victim: shards.silent.add(victim),
    "removed": VirtualShards.remove,
    "draining": VirtualShards.drain,
    "preempted": VirtualShards.preempt,
}
MOMENTS = ("open", "prefill", "token 1", "token 9", "end")


async def play(
    world: World, position: str, moment: str, sign: Callable[[VirtualShards, PeerId], None]
) -> None:
    """Let the shard of one position fail at a moment of a request, and check its answer."""
    done: list[float] = []

    def act(*shards: PeerId) -> bool:
        victims = [p for p in shards if str(world.shards.announced[p].layers) == wanted]
        for victim in victims:
            sign(world.shards, victim)
            done.append(trio.current_time())
        return bool(victims)

    wanted = RANGES[position]
    world.shards.on_moment[moment] = act
    started = trio.current_time()
    reader = await world.ask()
    assert await reader.read() == unfailed(make_request())
    assert done, "nothing failed"
    reader.times.insert(0, started)
    assert reader.longest_silence_s <= RECOVERY_S


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("position", RANGES)
@pytest.mark.parametrize("sign", SIGNS)
async def test_answer_is_whole_whatever_fails_when(
    autojump_clock: trio.testing.MockClock, sign: str, position: str, moment: str
) -> None:
    request = make_request()
    assert request.max_new_tokens is not None
    needed = len(request.prompt) + request.max_new_tokens
    async with open_world(context_tokens=needed) as world:
        await play(world, position, moment, SIGNS[sign])


@pytest.mark.parametrize("position", RANGES)
async def test_shard_that_died_before_the_request_is_passed_over(
    autojump_clock: trio.testing.MockClock, position: str
) -> None:
    async with open_world() as world:
        first = await world.ask()
        await first.read()
        (victim,) = [p for p in world.chain_of(first) if position in p]
        world.shards.kill(victim)

        second = await world.ask()

        assert await second.read() == unfailed(make_request())
        assert victim not in world.chain_of(second)


async def test_every_position_may_fail_in_one_answer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_world() as world:
        reader = await world.ask(make_request(count=90))
        for position in RANGES:
            await trio.sleep(20 * STEP_S)
            (victim,) = [p for p in world.chain_of(reader) if position in p]
            world.shards.kill(victim)

        assert await reader.read() == unfailed(make_request(count=90))
    assert len(world.shards.prompts) == 4


async def test_old_tokens_are_replayed_as_prompt_and_sent_to_nobody_twice(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_world() as world:
        reader = await world.ask()
        await trio.sleep(10 * STEP_S)
        before = list(reader.tokens)
        world.shards.kill(world.chain_of(reader)[1])
        answer = await reader.read()

    assert before
    assert answer[: len(before)] == before
    assert len(answer) == len(reader.events)


async def test_a_shard_that_stops_and_comes_back_while_nobody_else_can_goes_on_by_itself(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_world(replicas=1) as world:
        reader = await world.ask()
        await trio.sleep(5 * STEP_S)
        world.shards.silent.add(peer("middle-0"))
        await trio.sleep(20)
        world.shards.silent.clear()

        assert await reader.read() == unfailed(make_request())
    assert len(world.shards.prompts) == 1, "the session was never taken from its chain"


async def test_a_slow_chain_whose_shards_answer_is_left_alone(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_world() as world:
        reader = await world.ask()
        await trio.sleep(5 * STEP_S)
        chain = world.chain_of(reader)
        world.shards.hung.add(chain[1])
        await trio.sleep(Patience().step_deadline_s - 5)
        world.shards.hung.clear()

        assert await reader.read() == unfailed(make_request())
    assert len(world.shards.prompts) == 1
    assert world.chain_of(reader) == chain


async def test_a_stuck_chain_is_left_although_its_shards_answer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_world() as world:
        reader = await world.ask()
        await trio.sleep(5 * STEP_S)
        (stuck,) = [p for p in world.chain_of(reader) if "middle" in p]
        world.shards.hung.add(stuck)

        assert await reader.read() == unfailed(make_request())
    assert stuck not in world.chain_of(reader)


async def test_a_chain_that_is_always_stuck_ends_the_answer_with_the_deadline(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_world(replicas=1) as world:
        reader = await world.ask()
        await trio.sleep(5 * STEP_S)
        world.shards.hung.add(peer("middle-0"))

        with pytest.raises(StepTimeout) as caught:
            await reader.read()
    assert caught.value.fields["deadline_s"] == Patience().step_deadline_s
    assert len(world.shards.prompts) == MAX_FAILURES + 1
    assert reader.tokens == unfailed(make_request())[: len(reader.tokens)]


async def test_two_shards_that_do_not_reach_each_other_are_not_chained_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_world() as world:
        reader = await world.ask()
        await trio.sleep(5 * STEP_S)
        head, middle, _ = world.chain_of(reader)
        world.shards.cut_between(head, middle)

        assert await reader.read() == unfailed(make_request())
        assert not {head, middle} <= set(world.chain_of(reader))

        # neither is banned: with the other spares gone, each serves with another partner
        spares = {peer(f"{name}-{n}") for name in ("head", "middle") for n in (0, 1)}
        world.shards.kill((spares - {head, middle} - {p for p in spares if "head" in p}).pop())
        again = await world.ask()
        assert await again.read() == unfailed(make_request())
        assert middle in world.chain_of(again)


async def test_a_shard_without_a_spare_is_waited_for_and_heals_the_answer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_world(replicas=1) as world:
        reader = await world.ask()
        await trio.sleep(5 * STEP_S)
        world.shards.kill(peer("middle-0"))
        await trio.sleep(25)
        assert not reader.over.is_set()
        world.shards.revive("middle-0")

        assert await reader.read(within_s=RECOVERY_S) == unfailed(make_request())


@pytest.mark.parametrize("sign", ["reset", "reported", "silent", "removed"])
async def test_without_a_spare_the_answer_ends_with_the_layers_that_are_missing(
    autojump_clock: trio.testing.MockClock, sign: str
) -> None:
    patience = Patience(wait_for_peers_s=30.0)
    async with open_world(replicas=1, patience=patience) as world:
        reader = await world.ask()
        await trio.sleep(5 * STEP_S)
        SIGNS[sign](world.shards, peer("middle-0"))
        failed_at = trio.current_time()
        with pytest.raises(NoChain) as caught:
            await reader.read()
        waited_s = trio.current_time() - failed_at
        assert world.shards.sessions_at(peer("head-0")) == 0

    assert caught.value.fields["missing"] == "2:4"
    assert 30 <= waited_s <= 36
    assert reader.tokens == unfailed(make_request())[: len(reader.tokens)]


async def test_a_new_request_waits_a_little_for_a_peer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_world(replicas=1) as world:
        world.shards.kill(peer("tail-0"))
        async with trio.open_nursery() as nursery:

            async def revive() -> None:
                await trio.sleep(4)
                world.shards.revive("tail-0")

            nursery.start_soon(revive)
            reader = await world.ask()
        assert await reader.read() == unfailed(make_request())

        world.shards.kill(peer("tail-0"))
        started = trio.current_time()
        with pytest.raises(NoChain) as caught:
            await world.ask()
    assert caught.value.fields["missing"] == "4:6"
    assert 5 <= trio.current_time() - started <= 7


async def test_a_draining_shard_without_a_spare_serves_its_answer_to_the_end(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_world(replicas=1) as world:
        reader = await world.ask(make_request(count=200))
        await trio.sleep(5 * STEP_S)
        world.shards.drain(peer("middle-0"))

        assert await reader.read() == unfailed(make_request(count=200))
        with pytest.raises(NoChain):
            await world.ask()
    assert len(world.shards.prompts) == 1
    assert reader.longest_silence_s <= 4 * STEP_S


async def test_a_spare_that_comes_late_takes_a_draining_shard_s_sessions(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_world(replicas=1) as world:
        reader = await world.ask(make_request(count=200))
        await trio.sleep(5 * STEP_S)
        world.shards.drain(peer("middle-0"))
        await trio.sleep(2)
        world.shards.serve("middle-9", "2:4")
        await trio.sleep(3)

        assert world.shards.sessions_at(peer("middle-0")) == 0
        assert world.chain_of(reader)[1] == peer("middle-9")
        assert await reader.read() == unfailed(make_request(count=200))


async def test_tokens_that_come_while_the_next_chain_is_asked_are_not_doubled(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_world() as world:
        reader = await world.ask(make_request(count=60))
        await trio.sleep(5 * STEP_S)
        world.shards.travel_s = 6 * STEP_S
        world.shards.drain(world.chain_of(reader)[1])

        assert await reader.read() == unfailed(make_request(count=60))
    assert len(world.shards.prompts) == 2


async def test_tokens_that_come_while_a_full_chain_is_asked_are_not_lost(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_world(replicas=1) as world:
        world.shards.full.add(world.shards.serve("middle-1", "2:4", step_ms=9.0))
        reader = await world.ask(make_request(count=60))
        await trio.sleep(5 * STEP_S)
        world.shards.travel_s = 6 * STEP_S
        world.shards.drain(peer("middle-0"))

        assert await reader.read() == unfailed(make_request(count=60))
    assert len(world.shards.prompts) == 1


async def test_an_answer_that_ends_while_the_next_chain_is_asked_ends(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_world() as world:
        reader = await world.ask(make_request(count=12))
        await trio.sleep(5 * STEP_S)
        world.shards.travel_s = 20 * STEP_S
        world.shards.drain(world.chain_of(reader)[1])

        assert await reader.read() == unfailed(make_request(count=12))
        await trio.sleep(60 * STEP_S)
        assert [world.shards.sessions_at(p) for p in world.shards.members()] == [0] * 6


async def test_a_session_that_holds_the_only_slots_of_the_others_still_leaves_a_draining_shard(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_world(replicas=1, slots=1) as world:
        world.shards.serve("middle-1", "2:4")
        reader = await world.ask(make_request(count=60))
        await trio.sleep(5 * STEP_S)
        leaver = world.chain_of(reader)[1]
        world.shards.drain(leaver)

        assert await reader.read() == unfailed(make_request(count=60))
    assert world.chain_of(reader)[1] != leaver


async def test_a_full_spare_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    async with open_world(replicas=1, slots=1) as world:
        world.shards.serve("middle-1", "2:4", max_context_tokens=512)
        world.shards.serve("head-1", "0:2")
        world.shards.serve("tail-1", "4:6")
        first = await world.ask(make_request(count=100))
        second = await world.ask(make_request(count=200))
        assert not set(world.chain_of(first)) & set(world.chain_of(second))
        await trio.sleep(5 * STEP_S)
        world.shards.kill(world.chain_of(second)[1])

        assert await first.read() == unfailed(make_request(count=100))
        assert await second.read() == unfailed(make_request(count=200))


async def test_a_spare_that_stays_full_ends_the_answer_with_that_reason(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_world(replicas=2, slots=1, patience=Patience(wait_for_peers_s=2)) as world:
        await world.ask(make_request(count=400))
        second = await world.ask(make_request(count=400))
        world.shards.kill(world.chain_of(second)[1])

        with pytest.raises(ShardBusy):
            await second.read()


async def test_another_dtype_or_a_shorter_context_never_takes_over(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """It would change the text, or cut it."""
    async with open_world(replicas=1) as world:
        for name, layers in RANGES.items():
            world.shards.serve(f"{name}-bf16", layers, dtype="bf16", step_ms=9.0)
        world.shards.serve("middle-short", "2:4", max_context_tokens=32)
        reader = await world.ask()
        assert "bf16" not in str(world.chain_of(reader))
        await trio.sleep(5 * STEP_S)
        world.shards.kill(peer("middle-0"))

        with pytest.raises(NoChain) as caught:
            await reader.read()
    assert caught.value.fields["missing"] == "2:4"


async def test_a_dead_peer_is_never_tried_before_a_healthy_one(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Also long after its pause: its announcement outlives it."""
    async with open_world() as world:
        first = await world.ask()
        (victim,) = [p for p in world.chain_of(first) if "middle" in p]
        world.shards.kill(victim)
        await first.read()
        world.shards.dialled.clear()
        for _ in range(20):
            await trio.sleep(40)
            reader = await world.ask()
            await reader.read()

    assert victim not in world.shards.dialled


async def test_a_failed_peer_that_announces_itself_is_trusted_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_world() as world:
        first = await world.ask()
        (victim,) = [p for p in world.chain_of(first) if "middle" in p]
        world.shards.kill(victim)
        await first.read()
        world.shards.revive(victim.rpartition("--")[2].lstrip("-"))
        await trio.sleep(40)
        (other,) = [p for p in world.shards.members() if "middle" in p and p != victim]
        world.shards.kill(other)

        reader = await world.ask()
        assert await reader.read() == unfailed(make_request())
    assert victim in world.chain_of(reader)


async def test_closing_a_session_that_is_being_moved_frees_every_slot(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_world() as world:
        reader = await world.ask()
        await trio.sleep(5 * STEP_S)
        world.shards.kill(world.chain_of(reader)[1])
        await trio.sleep(0.005)
        world.client.close(reader.session)
        await trio.sleep(10)

        assert [world.shards.sessions_at(p) for p in world.shards.members()] == [0] * 6
    assert not reader.over.is_set()


async def test_an_error_of_our_own_ends_one_session_and_no_other(
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with open_world() as world:
        reader, other = await world.ask(), await world.ask(make_request(seed=8))
        await trio.sleep(5 * STEP_S)
        with monkeypatch.context() as patch:
            patch.setattr(world.routes, "choose", lambda **_: 1 / 0)
            reader.session.attempt.fail(StepTimeout(deadline_s=1, chain="c"))
            with pytest.raises(PalsError) as caught:
                await reader.read()
        assert await other.read() == unfailed(make_request(seed=8))

    assert caught.value.code == "PALS-INTERNAL"
    assert "ZeroDivisionError" in caplog.text


# --- room that goes to others ----------------------------------------------------------


def preempt_at(world: World, moment: str, victim: PeerId, *, times: int = 1) -> None:
    """Let a shard give the room of a session away whenever it reaches a moment."""
    done: list[str] = []

    def act(*shards: PeerId) -> bool:
        if victim in shards:
            done.append(moment)
            world.shards.preempt(victim)
        return len(done) == times

    world.shards.on_moment[moment] = act


@pytest.mark.parametrize("position", RANGES)
@pytest.mark.parametrize("moment", ["open", "prefill", "token 5"])
async def test_a_preempted_session_blames_nobody_and_takes_its_own_place(
    autojump_clock: trio.testing.MockClock, moment: str, position: str
) -> None:
    async with open_world() as world:
        victim = peer(f"{position}-0")
        preempt_at(world, moment, victim)
        reader = await world.ask()
        assert await reader.read() == unfailed(make_request())
        assert reader.session is not None
        assert reader.session.failures == 0
        assert world.routes._suspects._failures == {}
        assert world.chain_of(reader) == [peer(f"{name}-0") for name in RANGES]
        (first, second) = dict.fromkeys(message.session for _, message in world.shards.opens)
        assert {m.replaces for _, m in world.shards.opens if m.session == first} == {b""}
        assert {m.replaces for _, m in world.shards.opens if m.session == second} == {first}


async def test_a_shard_that_always_gives_the_room_away_is_left_for_another(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_world() as world:
        preempt_at(world, "prefill", peer("middle-0"), times=1000)
        reader = await world.ask()
        assert await reader.read() == unfailed(make_request())
        assert world.chain_of(reader)[1] == peer("middle-1")
        assert world.routes._suspects._failures == {}


async def test_without_another_shard_that_ends_the_request_as_one_that_may_come_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_world(replicas=1) as world:
        preempt_at(world, "open", peer("middle-0"), times=1000)
        with pytest.raises(SessionPreempted) as caught:
            await world.ask()
        assert (caught.value.http_status, caught.value.retryable) == (429, True)
        assert len(world.shards.opens) <= 3 * (MAX_PREEMPTIONS + 2)


async def test_an_answer_whose_room_always_goes_to_others_ends_with_that(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_world(replicas=1) as world:
        preempt_at(world, "prefill", peer("tail-0"), times=1000)
        reader = await world.ask()
        with pytest.raises(SessionPreempted):
            await reader.read()
        assert world.routes._suspects._failures == {}


async def test_a_session_whose_room_went_to_others_waits_for_it_longer_than_for_peers(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_world(replicas=1, patience=Patience(wait_for_peers_s=5.0)) as world:
        victim = peer("middle-0")
        preempt_at(world, "token 5", victim)
        reader = await world.ask()
        world.shards.full.add(victim)
        await trio.sleep(60.0)
        assert not reader.over.is_set()
        world.shards.full.clear()
        assert await reader.read() == unfailed(make_request())


# --- what is held ------------------------------------------------------------------------

LONG = tuple(range(1, 201))


async def test_the_rest_of_an_answer_begins_behind_what_every_shard_still_has(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Names of prompt and answer: the shard that gave the room away still has some of it."""
    async with open_world() as world:
        request = make_request(count=100, prompt=LONG)
        world.shards.holds_no_more_than[peer("tail-0")] = 128
        preempt_at(world, "token 70", peer("tail-0"))
        reader = await world.ask(request)
        assert await reader.read() == unfailed(request)
        assert world.shards.starts == [0, 128]


async def test_another_chain_of_shards_that_saw_the_prompt_before_begins_behind_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_world() as world:
        request = make_request(count=40, prompt=LONG)
        for name in RANGES:
            world.shards.serve(f"{name}-0", RANGES[name], step_ms=0.5)
        first = await world.ask(request)
        await first.read()
        for name in RANGES:
            world.shards.serve(f"{name}-0", RANGES[name], step_ms=2.0)
        second = await world.ask(request)
        await second.read()
        world.shards.on_moment["token 3"] = lambda *_: world.shards.kill(peer("tail-1")) or True
        third = await world.ask(request)
        assert await third.read() == unfailed(request)
    assert world.shards.starts[:3] == [0, 0, 192]
    assert world.shards.starts[-1] == 192
