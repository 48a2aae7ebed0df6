from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.engine.batch import Admitted, BatchRules, Ended, Preempted, Refused, SessionRequest, Step
from pals.engine.batcher import Batcher
from pals.engine.buckets import BatchLimits, Program
from pals.engine.pacing import SMOOTHING
from pals.engine.prefix import hash_blocks
from pals.errors import (
    AdmissionTimeout,
    DeadlineExceeded,
    InternalStepError,
    InvalidConfig,
    InvalidStep,
    PeerSessionsFull,
    QueueFull,
    SessionTooLong,
    ShardFull,
)
from pals.types import PeerId, SessionId
from tests.unit.engine.virtual_batch import LIMITS, Answer, World, cost, make_batcher

ALICE, BOB, CAROL = PeerId("12D3alice"), PeerId("12D3bob"), PeerId("12D3carol")
PEERS = (ALICE, BOB, CAROL)


def name(text: str) -> SessionId:
    return SessionId(text.encode().ljust(16, b"-"))


def shown(session: SessionId) -> str:
    return session.rstrip(b"-").decode()


def request(
    text: str, peer: PeerId = ALICE, prompt: int = 10, longest: int = 200, **others
) -> SessionRequest:
    return SessionRequest(
        session=name(text), peer=peer, prompt_tokens=prompt, max_tokens=longest, **others
    )


def open_all(batcher: Batcher, *requests: SessionRequest, now: float = 0.0) -> None:
    for one in requests:
        batcher.open(one, now)
    assert batcher.plan(now) is None
    assert batcher.take_events() == [Admitted(one.session, 0) for one in requests]


def describe(step: Step | None) -> str:
    """Return ``program: session@position+tokens …``, or nothing."""
    if step is None:
        return ""
    rows = " ".join(f"{shown(r.session)}@{r.position}+{r.tokens}" for r in step.all_rows)
    return f"{step.program.kind}: {rows}"


def run(batcher: Batcher, now: float = 0.0, seconds: float = 0.1) -> str:
    step = batcher.plan(now)
    if step is not None:
        batcher.finish(step, seconds)
    return describe(step)


def prefill(batcher: Batcher, text: str, tokens: int = 10, now: float = 0.0) -> None:
    batcher.add(name(text), "prefill", 0, tokens, now)
    while run(batcher, now):
        pass


# --- rows ----------------------------------------------------------------------------


def test_decode_rows_of_all_sessions_run_in_one_step() -> None:
    batcher, _ = make_batcher(40)
    open_all(batcher, *(request(text) for text in "abc"))
    for text in "abc":
        prefill(batcher, text)
    for text in "abc":
        batcher.add(name(text), "decode", 10, 1, 1.0)

    assert run(batcher, 1.0) == "decode: a@10+1 b@10+1 c@10+1"
    assert run(batcher, 1.0) == ""


def test_peer_whose_rows_were_away_is_owed_nothing() -> None:
    batcher, _ = make_batcher(60, limits=replace(LIMITS, max_rows=2))
    open_all(batcher, *(request(text, BOB) for text in ("b1", "b2")))
    open_all(batcher, *(request(text) for text in ("a1", "a2")))
    for text in ("b1", "b2", "a1", "a2"):
        prefill(batcher, text)
    for position in range(10, 20):
        batcher.add(name("b1"), "decode", position, 1, 1.0)
        run(batcher, 1.0)
    for text, position in (("a1", 10), ("a2", 10), ("b1", 20), ("b2", 10)):
        for n in range(6):
            batcher.add(name(text), "decode", position + n, 1, 1.0)

    steps = " ".join(run(batcher, 1.0) for _ in range(5))
    assert (steps.count("a1@") + steps.count("a2@"), steps.count("@")) == (5, 10)


def test_rows_that_are_about_to_come_back_run_in_the_same_step() -> None:
    batcher, _ = make_batcher(40)
    open_all(batcher, request("a"), request("b"))
    for text in "ab":
        prefill(batcher, text)
    for round_ in range(3):
        now, position = 1.0 + round_, 10 + round_
        for text in "ab":
            batcher.add(name(text), "decode", position, 1, now)
        assert run(batcher, now) == f"decode: a@{position}+1 b@{position}+1"
        assert run(batcher, now + 0.1) == ""  # the step is over: both are away

    batcher.add(name("a"), "decode", 13, 1, 4.0)
    assert run(batcher, 4.0) == ""
    assert 4.0 < batcher.next_at() < 4.1
    batcher.add(name("b"), "decode", 13, 1, 4.001)
    assert run(batcher, 4.001) == "decode: a@13+1 b@13+1"

    assert run(batcher, 4.1) == ""
    batcher.add(name("a"), "decode", 14, 1, 5.0)
    assert run(batcher, 5.0) == ""
    assert run(batcher, batcher.next_at() + 1e-6) == "decode: a@14+1"  # b did not come


def test_many_short_prompts_take_more_of_the_time_than_a_long_one() -> None:
    many, _ = make_batcher(200)
    one, _ = make_batcher(200)
    texts = "bcdefghi"
    open_all(many, request("a"), *(request(text, prompt=60) for text in texts))
    open_all(one, request("a"), request("b", prompt=480, longest=600))
    prompts = {id(many): [(text, 60) for text in texts], id(one): [("b", 480)]}
    steps: dict[int, int] = {}
    for batcher in (many, one):
        prefill(batcher, "a")
        now, position = 1.0, 10
        for text, tokens in prompts[id(batcher)]:
            batcher.add(name(text), "prefill", 0, tokens, now)
        waiting = 480
        while waiting:
            batcher.add(name("a"), "decode", position, 1, now)
            step = batcher.plan(now)
            assert step is not None
            now += cost(step.program)
            batcher.finish(step, cost(step.program))
            waiting -= step.chunk.tokens if step.chunk is not None else 0
            position += 1
        steps[id(batcher)] = position - 10

    assert steps[id(many)] < 0.7 * steps[id(one)]


def test_far_more_prompts_than_rows_go_ahead_of_them_three_at_a_time() -> None:
    batcher, _ = make_batcher(400)
    texts = [f"p{number}" for number in range(40)]
    open_all(batcher, request("a"), *(request(text, prompt=60) for text in texts))
    prefill(batcher, "a")
    for text in texts:
        batcher.add(name(text), "prefill", 0, 60, 1.0)

    kinds: list[str] = []
    now, position, waiting = 1.0, 10, 40 * 60
    while waiting:
        if not kinds or kinds[-1] != "chunk":
            batcher.add(name("a"), "decode", position, 1, now)
            position += 1
        step = batcher.plan(now)
        assert step is not None
        kinds.append(step.program.kind)
        waiting -= step.chunk.tokens if step.chunk is not None else 0
        now += cost(step.program)
        batcher.finish(step, cost(step.program))

    runs = [len(list(steps)) for kind, steps in itertools.groupby(kinds) if kind == "chunk"]
    assert max(runs) == 3
    assert sum(runs) > len(texts) / 2


def test_peer_who_only_decodes_keeps_half_of_the_time_beside_a_flood_of_prompts() -> None:
    batcher, _ = make_batcher(400)
    texts = [f"p{number}" for number in range(40)]
    open_all(batcher, request("b", BOB), *(request(text, prompt=60) for text in texts))
    prefill(batcher, "b")
    for text in texts:
        batcher.add(name(text), "prefill", 0, 60, 1.0)

    now, position, decoding_s = 1.0, 10, 0.0
    is_away = True
    while now < 6.0:
        if is_away:
            batcher.add(name("b"), "decode", position, 1, now)
            position += 1
        step = batcher.plan(now)
        assert step is not None
        is_away = bool(step.rows)
        decoding_s += cost(Program(2, 1, 0, 64)) if is_away else 0.0
        now += cost(step.program)
        batcher.finish(step, cost(step.program))

    assert 0.45 < decoding_s / 5.0 < 0.6


def gaps_of(batcher: Batcher, away_s: float) -> float:
    """Let session a decode, each time after so long; return when its last row has left."""
    prefill(batcher, "a")
    now = 1.0
    for position in range(10, 20):
        batcher.add(name("a"), "decode", position, 1, now)
        assert run(batcher, now, 0.06).startswith("decode: a")
        now += 0.06
        assert run(batcher, now) == ""
        now += away_s
    return now - away_s


@pytest.mark.parametrize(("away_s", "tokens"), [(0.1, 16), (0.17, 16), (0.2, 64), (2.0, 64)])
def test_chunk_between_rows_ends_before_they_come(away_s: float, tokens: int) -> None:
    batcher, _ = make_batcher(200, replace(LIMITS, max_chunk_tokens=512))
    open_all(batcher, request("a"), request("b", prompt=400, longest=600))
    left_at = gaps_of(batcher, away_s)
    batcher.add(name("b"), "prefill", 0, 400, left_at)

    assert run(batcher, left_at) == f"chunk: b@0+{tokens}"


def test_chunk_waits_for_the_next_gap_where_this_one_is_too_short_for_it() -> None:
    batcher, _ = make_batcher(200, replace(LIMITS, max_chunk_tokens=512))
    open_all(batcher, request("a"), request("b", prompt=400, longest=600))
    left_at = gaps_of(batcher, 0.1)
    batcher.add(name("b"), "prefill", 0, 400, left_at + 0.05)

    assert run(batcher, left_at + 0.05) == ""
    assert batcher.next_at() == pytest.approx(left_at + 0.2)
    batcher.add(name("a"), "decode", 20, 1, left_at + 0.12)  # it is late
    assert run(batcher, left_at + 0.12, 0.06).startswith("decode: a")
    assert run(batcher, left_at + 0.18) == "chunk: b@0+16"


def test_chunk_waits_no_longer_for_rows_that_do_not_come() -> None:
    batcher, _ = make_batcher(200, replace(LIMITS, max_chunk_tokens=512))
    open_all(batcher, request("a"), request("b", prompt=400, longest=600))
    left_at = gaps_of(batcher, 0.1)
    batcher.add(name("b"), "prefill", 0, 400, left_at + 0.05)

    assert run(batcher, left_at + 0.05) == ""
    assert run(batcher, batcher.next_at() + 1e-6) == "chunk: b@0+64"


def test_chunk_that_no_gap_is_long_enough_for_does_not_wait_for_one() -> None:
    batcher, _ = make_batcher(200, replace(LIMITS, max_chunk_tokens=512))
    open_all(batcher, request("a"), request("b", prompt=400, longest=600))
    left_at = gaps_of(batcher, 0.05)
    batcher.add(name("b"), "prefill", 0, 400, left_at + 0.03)

    assert run(batcher, left_at + 0.03) == "chunk: b@0+64"


def test_time_between_rows_counts_for_half_again_after_the_chunks_that_end_within_it() -> None:
    batcher, _ = make_batcher(200, replace(LIMITS, max_chunk_tokens=512))
    long = request("b", prompt=400, longest=600)
    open_all(batcher, request("a"), long, request("c"), request("d"))
    left_at = gaps_of(batcher, 0.1)
    small_s, usual_s = (cost(Program(0, 1, tokens, 1)) for tokens in (16, 64))
    small_s += SMOOTHING * (0.1 - small_s)  # the prompt of a took 0.1 s
    batcher.add(name("b"), "prefill", 0, 400, left_at)
    assert run(batcher, left_at, small_s) == "chunk: b@0+16"
    batcher.close(name("b"))
    batcher.add(name("c"), "prefill", 0, 10, left_at)
    assert run(batcher, left_at, small_s) == "chunk: c@0+10"
    batcher.add(name("d"), "prefill", 0, 10, left_at)

    assert run(batcher, left_at) == ""
    missing_s = small_s - (usual_s - 2 * small_s)
    assert batcher.next_at() - left_at == pytest.approx(missing_s / (0.5 * 0.25))


def test_row_is_away_from_the_end_of_its_step_although_a_chunk_runs_right_after() -> None:
    batcher, _ = make_batcher(200, replace(LIMITS, max_chunk_tokens=512))
    open_all(batcher, request("a"), request("b", prompt=400, longest=600))
    now = gaps_of(batcher, 0.2) + 0.2
    for turn in range(10):
        batcher.add(name("b"), "prefill", 16 * turn, 16, now)
        batcher.add(name("a"), "verify", 20 + turn, 4, now)
        assert run(batcher, now, 0.06).startswith("verify: a")
        assert run(batcher, now + 0.06, 0.1) == f"chunk: b@{16 * turn}+16"
        assert run(batcher, now + 0.16) == ""
        now += 0.26
    batcher.add(name("a"), "decode", 30, 1, now)
    assert run(batcher, now, 0.06) == "decode: a@30+1"
    batcher.add(name("b"), "prefill", 160, 240, now + 0.06)

    assert run(batcher, now + 0.06) == "chunk: b@160+64"


def test_prompt_alone_runs_in_the_largest_chunks_without_much_padding() -> None:
    batcher, _ = make_batcher(40)
    open_all(batcher, request("a", prompt=100))
    batcher.add(name("a"), "prefill", 0, 60, 0.0)
    batcher.add(name("a"), "prefill", 60, 40, 0.0)

    assert [run(batcher) for _ in range(3)] == ["chunk: a@0+64", "chunk: a@64+36", ""]


def test_prompt_takes_its_share_beside_those_who_decode() -> None:
    batcher, _ = make_batcher(60)
    open_all(batcher, request("a"), request("p", prompt=190))
    prefill(batcher, "a")
    batcher.add(name("p"), "prefill", 0, 190, 0.0)
    batcher.add(name("a"), "decode", 10, 1, 0.0)

    first = batcher.plan(0.0)
    assert describe(first) == "mixed: a@10+1 p@0+16"


def test_prompt_goes_on_although_nothing_runs_it_beside_drafts() -> None:
    batcher, _ = make_batcher(60)
    open_all(batcher, request("a"), request("p", prompt=190))
    prefill(batcher, "a")
    batcher.add(name("p"), "prefill", 0, 190, 0.0)
    steps: list[str] = []
    for number in range(20):
        batcher.add(name("a"), "verify", 10, 4, float(number))
        steps.append(run(batcher, float(number)))

    kinds = [step.partition(":")[0] for step in steps]
    assert kinds[:2] == ["verify", "chunk"]
    assert 5 <= kinds.count("chunk") <= 10


def test_verified_rows_step_back_to_where_the_draft_was_wrong() -> None:
    batcher, pool = make_batcher(40)
    open_all(batcher, request("a"))
    prefill(batcher, "a")
    batcher.add(name("a"), "verify", 10, 4, 0.0)
    batcher.add(name("a"), "verify", 12, 3, 0.0)

    assert [run(batcher) for _ in range(2)] == ["verify: a@10+4", "verify: a@12+3"]
    assert pool.length(name("a")) == 15


def test_step_has_one_row_of_a_session() -> None:
    batcher, _ = make_batcher(40)
    open_all(batcher, request("a"))
    prefill(batcher, "a")
    batcher.add(name("a"), "decode", 10, 1, 0.0)
    batcher.add(name("a"), "prefill", 11, 5, 0.0)

    assert run(batcher) == "decode: a@10+1"
    assert run(batcher, 2.0) == "chunk: a@11+5"


def test_late_row_is_no_fault() -> None:
    batcher, _ = make_batcher(40)
    assert not batcher.add(name("a"), "decode", 0, 1, 0.0)


@pytest.mark.parametrize(
    ("kind", "position", "tokens"),
    [("prefill", 1, 1), ("prefill", 0, 0), ("prefill", 0, 201), ("prefill", -1, 1),
     ("decode", 0, 2), ("verify", 0, 5)],
)  # fmt: skip
def test_impossible_rows_are_refused_and_not_queued(kind, position: int, tokens: int) -> None:
    batcher, _ = make_batcher(40)
    open_all(batcher, request("a"))

    with pytest.raises(InvalidStep):
        batcher.add(name("a"), kind, position, tokens, 0.0)

    assert run(batcher) == ""


def test_tokens_that_wait_are_bounded_and_given_back() -> None:
    batcher, _ = make_batcher(40, rules=BatchRules(max_waiting_tokens=20))
    open_all(batcher, request("a"), request("b"))
    batcher.add(name("a"), "prefill", 0, 15, 0.0)
    with pytest.raises(QueueFull):
        batcher.add(name("b"), "prefill", 0, 6, 0.0)

    batcher.close(name("a"))
    batcher.add(name("b"), "prefill", 0, 20, 0.0)
    run(batcher)
    batcher.add(name("b"), "decode", 20, 1, 0.0)


@pytest.mark.parametrize("rules", [BatchRules(prefill_share=0.0), BatchRules(kv_share=1.0)])
def test_impossible_shares_are_refused(rules: BatchRules) -> None:
    with pytest.raises(InvalidConfig):
        make_batcher(40, rules=rules)


# --- admission -----------------------------------------------------------------------


def test_session_that_would_not_fit_alone_is_refused() -> None:
    batcher, _ = make_batcher(4)
    batcher.open(request("a", longest=64), 0.0)
    with pytest.raises(SessionTooLong) as caught:
        batcher.open(request("b", longest=65), 0.0)
    assert caught.value.fields == {"tokens": 65, "limit": 64}


def test_session_beyond_the_context_is_refused() -> None:
    batcher, _ = make_batcher(100)
    with pytest.raises(InvalidStep):
        batcher.open(request("a", longest=1025), 0.0)


def test_limits_of_sessions_are_refused_by_name() -> None:
    rules = BatchRules(max_sessions=1, max_sessions_per_peer=2, max_waiting_sessions=2)
    batcher, _ = make_batcher(40, rules=rules)
    open_all(batcher, request("a"))
    batcher.open(request("b"), 0.0)
    with pytest.raises(PeerSessionsFull):
        batcher.open(request("c"), 0.0)
    batcher.open(request("c", BOB), 0.0)
    with pytest.raises(ShardFull):
        batcher.open(request("d", CAROL), 0.0)
    with pytest.raises(InvalidStep):
        batcher.open(request("b", CAROL), 0.0)


def test_session_without_room_waits_and_is_refused_after_a_while() -> None:
    batcher, _ = make_batcher(8, rules=BatchRules(admission_wait_s=5.0))
    open_all(batcher, request("a", prompt=100, longest=120))
    batcher.open(request("b", BOB, prompt=100, longest=120), 1.0)
    batcher.plan(1.0)
    assert batcher.take_events() == []
    assert batcher.next_at() == 6.0

    batcher.plan(6.0)
    (refused,) = batcher.take_events()
    assert isinstance(refused, Refused)
    assert isinstance(refused.error, AdmissionTimeout)


def test_waiting_session_is_admitted_once_another_ends() -> None:
    batcher, _ = make_batcher(8)
    open_all(batcher, request("a", prompt=100, longest=120))
    batcher.open(request("b", BOB, prompt=100, longest=120), 0.0)
    batcher.plan(0.0)
    batcher.close(name("a"))
    batcher.plan(0.0)
    assert batcher.take_events() == [Admitted(name("b"), 0)]


def test_nobody_passes_the_first_in_line() -> None:
    batcher, _ = make_batcher(8)
    open_all(batcher, request("a", prompt=60, longest=120))
    batcher.open(request("b", BOB, prompt=100, longest=120), 0.0)
    batcher.plan(0.0)
    batcher.open(request("c", CAROL, prompt=1, longest=120), 0.0)
    batcher.plan(0.0)
    assert batcher.take_events() == []


def test_newcomer_leaves_a_page_to_each_that_runs() -> None:
    batcher, _ = make_batcher(8)
    open_all(batcher, request("a", prompt=60, longest=120))
    batcher.open(request("b", BOB, prompt=60, longest=120), 0.0)
    batcher.plan(0.0)
    assert batcher.take_events() == []

    batcher.close(name("b"))
    open_all(batcher, request("c", BOB, prompt=47, longest=120))


def test_deadlines_end_sessions_that_wait_and_that_run() -> None:
    batcher, _ = make_batcher(8)
    open_all(batcher, request("a", prompt=100, longest=120, deadline=3.0))
    batcher.open(request("b", BOB, prompt=100, longest=120, deadline=2.0), 0.0)
    batcher.plan(0.0)
    assert batcher.next_at() == 2.0
    batcher.plan(2.0)
    batcher.plan(3.0)

    refused, ended = batcher.take_events()
    assert isinstance(refused, Refused)
    assert isinstance(refused.error, DeadlineExceeded)
    assert isinstance(ended, Ended)
    assert isinstance(ended.error, DeadlineExceeded)
    assert batcher.num_running == 0


# --- pages ---------------------------------------------------------------------------


def fill(batcher: Batcher, text: str, tokens: int) -> None:
    """Let a session write until it has some tokens."""
    prefill(batcher, text, tokens)


def test_older_session_takes_the_pages_of_a_younger_one() -> None:
    batcher, pool = make_batcher(8)
    open_all(batcher, request("a", longest=120), request("b", longest=120))
    fill(batcher, "a", 64)
    fill(batcher, "b", 64)
    batcher.add(name("a"), "decode", 64, 1, 1.0)

    assert run(batcher, 1.0) == "decode: a@64+1"
    assert batcher.take_events() == [Preempted(name("b"))]
    assert pool.available == 3


def test_younger_session_waits_for_pages_until_an_older_one_ends() -> None:
    batcher, _ = make_batcher(8)
    open_all(batcher, request("a", longest=120), request("b", longest=120))
    fill(batcher, "a", 64)
    fill(batcher, "b", 64)
    batcher.add(name("b"), "decode", 64, 1, 1.0)
    assert run(batcher, 1.0) == ""

    batcher.close(name("a"))
    assert run(batcher, 1.0) == "decode: b@64+1"
    assert batcher.take_events() == []


def test_peer_within_its_share_takes_back_what_another_has_beyond_its_own_once() -> None:
    batcher, _ = make_batcher(20)
    open_all(batcher, request("a", longest=320))
    fill(batcher, "a", 320)
    batcher.open(request("b", BOB, prompt=40, longest=300), 1.0)
    batcher.plan(1.0)
    assert batcher.take_events() == [Preempted(name("a")), Admitted(name("b"), 0)]

    again = request("a2", prompt=310, longest=320, replaces=name("a"))
    batcher.open(again, 2.0)
    batcher.close(name("b"))
    batcher.plan(2.0)
    assert batcher.take_events() == [Admitted(name("a2"), 0)]
    batcher.open(request("c", BOB, prompt=40, longest=300), 3.0)
    batcher.plan(3.0)
    assert batcher.take_events() == []


def test_peer_within_its_share_keeps_its_pages_from_older_sessions() -> None:
    batcher, _ = make_batcher(20)
    open_all(
        batcher,
        request("a", longest=320),
        request("b", BOB, longest=320),
        request("c", CAROL, longest=320),
    )
    fill(batcher, "a", 10)
    fill(batcher, "b", 224)
    fill(batcher, "c", 80)
    batcher.add(name("a"), "decode", 10, 1, 5.0)
    batcher.add(name("b"), "decode", 224, 1, 5.0)

    assert run(batcher, 5.0) == "decode: a@10+1"
    assert run(batcher, 5.5) == ""
    assert batcher.take_events() == []
    assert batcher.next_at() == 6.5

    # a pauses: nobody waits for it, and b goes on as the oldest.
    assert run(batcher, 6.5) == "decode: b@224+1"
    assert batcher.take_events() == [Preempted(name("c"))]


def test_replay_of_another_peer_or_of_another_length_keeps_no_place() -> None:
    for changed in ({"peer": BOB}, {"longest": 100}, {"prompt": 9}):
        batcher, _ = make_batcher(8)
        open_all(batcher, request("a", longest=120), request("b", longest=120), now=1.0)
        batcher.close(name("a"))
        given = {"peer": ALICE, "longest": 120, "prompt": 10} | changed
        again = request("a2", replaces=name("a"), **given)
        open_all(batcher, again, now=2.0)
        fill(batcher, "a2", 64)
        fill(batcher, "b", 64)
        batcher.add(name("a2"), "decode", 64, 1, 3.0)
        assert run(batcher, 3.0) == "" or changed == {"peer": BOB}


def test_held_prompt_is_held_again_after_its_last_token_was_computed_anew() -> None:
    batcher, _ = make_batcher(20)
    names = hash_blocks(b"s" * 32, [7] * 64)
    open_all(batcher, request("a", prompt=64, names=names))
    prefill(batcher, "a", 64)
    batcher.close(name("a"))
    for text in "bc":
        batcher.open(request(text, prompt=64, names=names), 1.0)
        batcher.plan(1.0)
        assert batcher.take_events() == [Admitted(name(text), 64)]
        batcher.add(name(text), "prefill", 63, 1, 1.0)
        assert run(batcher, 1.0) == f"chunk: {text}@63+1"
        batcher.close(name(text))


def test_no_more_is_held_than_the_prompt_has() -> None:
    batcher, _ = make_batcher(20)
    names = hash_blocks(b"s" * 32, [7] * 128)
    open_all(batcher, request("a", prompt=128, names=names))
    prefill(batcher, "a", 128)
    batcher.close(name("a"))
    batcher.open(request("b", prompt=100, longest=101, names=names), 1.0)
    batcher.plan(1.0)
    assert batcher.take_events() == [Admitted(name("b"), 64)]


def test_prompt_that_is_taken_back_is_not_held_for_others() -> None:
    batcher, _ = make_batcher(20)
    names = hash_blocks(b"s" * 32, [7] * 64)
    open_all(batcher, request("a", prompt=70, names=names))
    prefill(batcher, "a", 70)
    batcher.add(name("a"), "verify", 30, 4, 1.0)
    assert run(batcher, 1.0) == "verify: a@30+4"

    batcher.open(request("b", prompt=70, names=names), 2.0)
    batcher.plan(2.0)
    assert batcher.take_events() == [Admitted(name("b"), 16)]


def test_closed_session_frees_its_pages_at_once() -> None:
    batcher, pool = make_batcher(8)
    open_all(batcher, request("a", longest=120))
    batcher.add(name("a"), "prefill", 0, 100, 0.0)
    step = batcher.plan(0.0)
    assert step is not None

    batcher.close(name("a"))
    assert pool.available == 8
    batcher.finish(step, 0.1)
    assert run(batcher) == ""


def test_failed_step_ends_every_session_and_empties_the_pool() -> None:
    batcher, pool = make_batcher(8)
    open_all(batcher, request("a", longest=120), request("b", longest=120))
    batcher.add(name("a"), "prefill", 0, 64, 0.0)
    assert batcher.plan(0.0) is not None

    batcher.fail(InternalStepError(layers="0:1"))

    assert [type(event) for event in batcher.take_events()] == [Ended, Ended]
    assert (pool.available, batcher.num_running) == (8, 0)
    open_all(batcher, request("a", longest=120))


def test_fork_waits_until_its_parent_is_there() -> None:
    batcher, pool = make_batcher(20)
    open_all(batcher, request("a", prompt=20))
    batcher.fork(name("a"), name("b"), 20, 0.0)
    batcher.add(name("b"), "decode", 20, 1, 0.0)
    assert run(batcher) == ""
    batcher.add(name("a"), "prefill", 0, 20, 0.0)
    assert [run(batcher) for _ in range(2)] == ["chunk: a@0+16", "chunk: a@16+4"]
    assert run(batcher) == "decode: b@20+1"
    assert batcher.take_events() == [Admitted(name("b"), 20)]
    assert pool.used_by(ALICE) == 3


def test_fork_of_a_session_that_ends_before_is_replayed_by_its_driver() -> None:
    batcher, _ = make_batcher(20)
    open_all(batcher, request("a", prompt=20))
    batcher.fork(name("a"), name("b"), 20, 0.0)
    batcher.close(name("a"))
    batcher.plan(0.0)
    assert batcher.take_events() == [Preempted(name("b"))]
    assert batcher.num_running == 0


# --- whole answers -------------------------------------------------------------------


def check_all(world: World, answers: list[Answer]) -> None:
    for answer in answers:
        assert answer.error is None
        assert answer.tokens == answer.expected
    for shard in world.shards:
        assert shard.batcher.num_running == 0
        assert shard.pool.available == shard.pool.num_pages
        assert shard.batcher.take_events() == []


PROMPTS = st.builds(
    lambda family, common, own: [family] * common + own,
    st.integers(0, 1),
    st.integers(1, 150),
    st.lists(st.integers(0, 9), max_size=30),
)


@st.composite
def answers(draw: st.DrawFn, most_tokens: int) -> list[Answer]:
    count = draw(st.integers(1, 8))
    made: list[Answer] = []
    for number in range(count):
        prompt = draw(PROMPTS)[: most_tokens - 1]
        max_new = draw(st.integers(1, min(60, most_tokens - len(prompt))))
        forks = draw(st.integers(0, 2)) if len(prompt) > 1 else 0
        peer = draw(st.sampled_from(PEERS))
        draft = draw(st.sampled_from([1, 1, 4]))
        children = [
            Answer(peer=peer, prompt=prompt, max_new=max_new, seed=10 * number + n, draft=draft)
            for n in range(1, forks + 1)
        ]
        made.append(
            Answer(
                peer=peer,
                prompt=prompt,
                max_new=max_new,
                seed=10 * number,
                draft=draft,
                arrives=draw(st.floats(0, 3)),
                forks=children,
            )
        )
        made += children
    return made


@settings(max_examples=30)
@given(st.data(), st.lists(st.integers(14, 60), min_size=1, max_size=3))
def test_everybody_gets_the_answer_that_they_would_get_alone(
    data: st.DataObject, num_pages: list[int]
) -> None:
    """Batched, chunked, cached, forked, verified, preempted, replayed: the tokens are the same."""
    wanted = data.draw(answers(most_tokens=16 * min(num_pages)))
    world = World(num_pages)
    for answer in wanted:
        if not any(answer in parent.forks for parent in wanted):
            world.ask(answer)

    world.run()

    check_all(world, wanted)


@settings(max_examples=25)
@given(st.data(), st.integers(14, 40))
def test_cancelled_answers_disturb_nobody(data: st.DataObject, num_pages: int) -> None:
    wanted = data.draw(answers(most_tokens=16 * num_pages))
    world = World([num_pages])
    roots = [a for a in wanted if not any(a in parent.forks for parent in wanted)]
    for answer in roots:
        answer.forks = []
        world.ask(answer)
    cancelled = [a for a in roots if data.draw(st.booleans())]
    for answer in cancelled:
        world.at(data.draw(st.floats(0, 6)), lambda a=answer: world.cancel(a))

    world.run()

    check_all(world, [a for a in roots if a not in cancelled])


def test_the_pool_is_small_enough_to_preempt_and_answers_survive() -> None:
    wanted = [
        Answer(peer=PEERS[n % 3], prompt=[n] * 40, max_new=120, seed=n, arrives=0.1 * n)
        for n in range(8)
    ]
    world = World([24, 40])
    for answer in wanted:
        world.ask(answer)

    world.run()

    check_all(world, wanted)
    assert sum(answer.preemptions for answer in wanted) > 0


def test_a_stream_of_newcomers_starves_nobody() -> None:
    """Other peers ask without end; the long answer ends, and so does each of theirs."""
    world = World([30])
    long = world.ask(Answer(peer=ALICE, prompt=[1] * 200, max_new=250))
    numbers = itertools.count(2)
    asked: list[Answer] = []

    def ask_another(answer: Answer) -> None:
        if answer.is_done and not long.is_done and answer is not long:
            n = next(numbers)
            asked.append(Answer(peer=answer.peer, prompt=[n] * 60, max_new=20, seed=n))
            world.ask(asked[-1])

    world.on_token = ask_another
    for peer in (BOB, CAROL, BOB, CAROL):
        n = next(numbers)
        asked.append(Answer(peer=peer, prompt=[n] * 60, max_new=20, seed=n, arrives=0.5))
        world.ask(asked[-1])

    world.run()

    check_all(world, [long, *asked])
    assert long.preemptions <= 1
    assert len(asked) > 12


def test_a_peer_with_many_sessions_does_not_slow_another_down() -> None:
    limits = BatchLimits(max_rows=2, max_context_tokens=256, max_chunk_tokens=64, page_tokens=16)
    world = World([200], limits=limits)
    many = [world.ask(Answer(peer=ALICE, prompt=[n] * 9, max_new=60)) for n in range(7)]
    one = world.ask(Answer(peer=BOB, prompt=[9] * 9, max_new=60, arrives=2.0))

    world.run()

    check_all(world, [*many, one])
    pace = (one.times[-1] - one.times[0]) / len(one.times)
    others = [(a.times[-1] - a.times[0]) / len(a.times) for a in many]
    assert pace < 0.6 * min(others)


def test_decoding_keeps_its_rate_while_a_long_prompt_is_computed() -> None:
    world = World([200])
    decoding = [
        world.ask(Answer(peer=ALICE, prompt=[n] * 8, max_new=300, seed=n)) for n in range(4)
    ]
    world.run(until=4.0)
    before = [len(answer.tokens) for answer in decoding]
    long = world.ask(Answer(peer=BOB, prompt=[5] * 900, max_new=2))
    world.run(until=8.0)
    during = [len(answer.tokens) - count for answer, count in zip(decoding, before, strict=True)]
    alone = [sum(1 < time <= 4 for time in answer.times) * 4 / 3 for answer in decoding]
    world.run()

    check_all(world, [*decoding, long])
    assert all(now >= 0.7 * then for now, then in zip(during, alone, strict=True))


def test_repeated_prompt_is_computed_but_for_its_last_token() -> None:
    world = World([60, 80])
    prompt = [3] * 320
    first = world.ask(Answer(peer=ALICE, prompt=prompt, max_new=3))
    world.run()
    second = world.ask(Answer(peer=ALICE, prompt=prompt, max_new=3))
    stranger = world.ask(Answer(peer=BOB, prompt=prompt, max_new=3))
    world.run()
    third = world.ask(Answer(peer=ALICE, prompt=prompt, max_new=3))
    world.run()

    check_all(world, [first, second, stranger, third])
    for shard in world.shards:
        prefilled = [s.chunk.tokens for s in shard.steps if s.chunk is not None]
        assert sum(prefilled) == 2 * len(prompt) + 2


def test_limits_of_the_tests_have_every_kind_of_program() -> None:
    batcher, _ = make_batcher(20)
    kinds = {program.kind for program in batcher.programs}
    assert kinds == {"decode", "verify", "chunk", "mixed"}
