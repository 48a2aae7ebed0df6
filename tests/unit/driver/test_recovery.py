from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.driver.recovery import (
    MIN_PREFILL_DEADLINE_S,
    MIN_STEP_DEADLINE_S,
    Patience,
    PrefillPace,
    Round,
    StepClock,
)
from pals.errors import (
    InvalidFrame,
    NoChain,
    PalsError,
    PeerUnreachable,
    SessionRefused,
    ShardBusy,
    ShardDraining,
    ShardLost,
    StepTimeout,
)
from pals.net.announce import Announcement
from pals.net.route import Chain
from pals.types import LayerRange, PeerId

NOW = 1000.0
LIMIT_S = 30.0
NO_CHAIN = NoChain(model="m", missing="2:4")


def make_clock(
    *, step_ms: float = 0.0, prompt: int = 10, pace: PrefillPace | None = None
) -> StepClock:
    return StepClock.start(
        limit_s=LIMIT_S,
        pace=pace or PrefillPace(),
        step_ms=step_ms,
        prompt_tokens=prompt,
        sent=NOW,
        now=NOW,
    )


def chain(*peers: str) -> Chain:
    hops = [
        Announcement(
            peer=PeerId(peer),
            model_id="m",
            manifest=bytes(32),
            layers=LayerRange(number, number + 1),
            num_layers=len(peers),
            layer_hashes=(bytes(16),),
            dtype="f32",
            free_tokens=1,
            max_context_tokens=64,
            step_ms=1.0,
            addresses=(),
            seq=1,
            expires_at=time.time() + 60,
        )
        for number, peer in enumerate(peers)
    ]
    return Chain(hops=tuple(hops))


# --- deadlines -----------------------------------------------------------------------


def test_fast_chain_is_suspected_after_a_second() -> None:
    clock = make_clock(step_ms=5.0)
    clock.note_token(NOW + 1)
    clock.note_token(NOW + 1.01)
    assert clock.suspicious_at == pytest.approx(NOW + 1.01 + MIN_STEP_DEADLINE_S)


def test_announced_time_of_a_slow_step_is_believed_before_any_is_measured() -> None:
    clock = make_clock(step_ms=2000.0)
    clock.note_token(NOW + 1)
    assert clock.suspicious_at == pytest.approx(NOW + 1 + 8.0)


def test_measured_steps_replace_the_announced_time() -> None:
    clock = make_clock(step_ms=10.0)
    for number in range(60):
        clock.note_token(NOW + 2.0 * number)
    assert clock.step_s == pytest.approx(2.0, rel=0.01)
    assert clock.suspicious_at == pytest.approx(clock.last + 8.0, rel=0.01)
    assert clock.stuck_at == pytest.approx(clock.last + 40.0, rel=0.01)


def test_prompt_has_a_deadline_of_its_own_by_the_pace_of_those_before() -> None:
    pace = PrefillPace()
    assert make_clock(prompt=2048, pace=pace).suspicious_at == NOW + MIN_PREFILL_DEADLINE_S
    pace.note(1000, 20.0)
    pace.note(1000, 5.0)
    clock = make_clock(prompt=2048, pace=pace)
    assert clock.suspicious_at == pytest.approx(NOW + 4 * 256 * 0.02)
    assert clock.stuck_at == pytest.approx(NOW + max(LIMIT_S * 5, 4 * 2048 * 0.02))


def test_first_token_sets_the_pace_for_the_next_prompts() -> None:
    pace = PrefillPace()
    make_clock(prompt=100, pace=pace).note_token(NOW + 5)
    assert pace.s_per_token == pytest.approx(0.05)


def test_answers_put_suspicion_off_but_not_the_end() -> None:
    clock = make_clock()
    clock.note_token(NOW + 1)
    stuck_at = clock.stuck_at
    clock.note_answers(NOW + 9)
    assert clock.suspicious_at == NOW + 9 + MIN_STEP_DEADLINE_S
    assert clock.stuck_at == stuck_at == NOW + 1 + LIMIT_S


@given(st.floats(0, 1e5), st.integers(1, 10**6), st.lists(st.floats(0.0, 100.0), max_size=20))
def test_a_chain_is_asked_before_it_is_given_up_and_never_within_a_second(
    step_ms: float, prompt: int, waits: list[float]
) -> None:
    clock = make_clock(step_ms=step_ms, prompt=prompt)
    now = NOW
    for wait_s in waits:
        now += wait_s
        clock.note_token(now)
    assert clock.last + MIN_STEP_DEADLINE_S <= clock.suspicious_at <= clock.stuck_at


def test_new_request_waits_shorter_than_a_running_one_but_not_longer_than_asked() -> None:
    assert Patience(wait_for_peers_s=30).new_request_s == 5
    assert Patience(wait_for_peers_s=2).new_request_s == 2


# --- rounds --------------------------------------------------------------------------


def test_only_the_peers_at_fault_are_avoided() -> None:
    tries = Round()
    tries.note(chain("a", "b"), frozenset({PeerId("b")}), PeerUnreachable(peer="b", problem="x"))
    assert tries.avoided == {(PeerId("b"), LayerRange(1, 2))}
    assert not tries.is_new(chain("a", "b"))
    assert tries.is_new(chain("a", "c"))


@pytest.mark.parametrize(
    "gone",
    [
        PeerUnreachable(peer="p", problem="x"),
        ShardLost(peer="p", layers="0:1", problem="x"),
        StepTimeout(deadline_s=1, chain="c"),
        ShardDraining(peer="p"),
    ],
)
def test_peers_that_are_gone_are_told_as_missing_layers(gone: PalsError) -> None:
    tries = Round()
    tries.note(chain("a"), frozenset({PeerId("a")}), gone)
    assert tries.explain(NO_CHAIN) is NO_CHAIN
    assert tries.explain(None) is gone


@pytest.mark.parametrize(
    "reason",
    [
        ShardBusy(peer="p", problem="full"),
        SessionRefused(peer="p", problem="no"),
        InvalidFrame(peer="p", problem="no"),
    ],
)
def test_other_reasons_are_told_as_they_are(reason: PalsError) -> None:
    tries = Round()
    tries.note(chain("a"), frozenset({PeerId("a")}), reason)
    assert tries.explain(NO_CHAIN) is reason


def test_a_full_shard_explains_more_than_a_dead_one() -> None:
    tries = Round()
    busy = ShardBusy(peer="a", problem="full")
    tries.note(chain("a"), frozenset({PeerId("a")}), busy)
    tries.note(chain("b"), frozenset({PeerId("b")}), PeerUnreachable(peer="b", problem="x"))
    assert tries.explain(NO_CHAIN) is busy


def test_a_round_that_tried_nothing_names_the_missing_layers() -> None:
    assert Round().explain(NO_CHAIN) is NO_CHAIN
