from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from pals.engine.fairness import FairOrder
from pals.types import PeerId

ALICE, BOB, CAROL = PeerId("alice"), PeerId("bob"), PeerId("carol")


def make_order(waiting: list[tuple[PeerId, str]]) -> FairOrder[str]:
    order: FairOrder[str] = FairOrder()
    for peer, member in waiting:
        order.begin(peer, member)
    return order


def serve(order: FairOrder[str], waiting: list[tuple[PeerId, str]], cost: float = 1.0) -> str:
    """Give the first in line something, and return who it was."""
    first = next(order.order(waiting))
    peer = next(peer for peer, member in waiting if member == first)
    order.charge(peer, first, cost)
    return first


def test_peers_come_in_turn_and_then_their_sessions() -> None:
    waiting = [(ALICE, "a1"), (ALICE, "a2"), (ALICE, "a3"), (BOB, "b1")]
    order = make_order(waiting)

    assert "".join(order.order(waiting)) == "a1b1a2a3"
    assert [serve(order, waiting) for _ in range(6)] == ["a1", "b1", "a2", "b1", "a3", "b1"]


def test_whoever_was_given_more_waits_longer() -> None:
    waiting = [(ALICE, "a"), (BOB, "b")]
    order = make_order(waiting)
    order.charge(ALICE, "a", 3)

    assert [serve(order, waiting) for _ in range(5)] == ["b", "b", "b", "a", "b"]


def test_who_was_away_has_saved_up_nothing() -> None:
    waiting = [(ALICE, "a"), (BOB, "b")]
    order = make_order(waiting)
    order.rest(BOB, "b")
    for _ in range(50):
        serve(order, waiting[:1])
    order.begin(BOB, "b")

    served = Counter(serve(order, waiting) for _ in range(10))
    assert served == {"a": 5, "b": 5}


def test_who_rests_between_turns_is_still_ahead_after() -> None:
    waiting = [(ALICE, "a"), (BOB, "b")]
    order = make_order(waiting)
    order.charge(ALICE, "a", 5)
    order.rest(ALICE, "a")
    order.begin(ALICE, "a")

    assert [serve(order, waiting) for _ in range(5)] == ["b"] * 5


def test_session_that_begins_late_waits_for_no_one_who_was_given_much() -> None:
    waiting = [(ALICE, "a1"), (ALICE, "a2")]
    order = make_order(waiting[:1])
    for _ in range(50):
        serve(order, waiting[:1])
    order.begin(ALICE, "a2")

    assert Counter(serve(order, waiting) for _ in range(20)) == {"a1": 10, "a2": 10}


def test_newcomers_never_pass_a_session_for_ever_that_was_given_something() -> None:
    order = make_order([(ALICE, "old")])
    order.charge(ALICE, "old", 10)
    passed = 0
    waiting = [(ALICE, "old")]
    for number in range(100):  # more come than can be served
        for half in "ab":
            waiting.append((ALICE, f"{number}{half}"))
            order.begin(*waiting[-1])
        first = serve(order, waiting, 10)
        if first == "old":
            break
        order.forget(ALICE, first)
        waiting.remove((ALICE, first))
        passed += 1

    assert passed < 25


def test_forgotten_members_leave_nothing_behind() -> None:
    order = make_order([(ALICE, "a"), (BOB, "b")])
    order.forget(ALICE, "a")
    order.forget(ALICE, "a")
    order.forget(CAROL, "c")
    assert list(order.order([(BOB, "b")])) == ["b"]
    order.begin(ALICE, "a")
    assert sorted(order.order([(ALICE, "a"), (BOB, "b")])) == ["a", "b"]


MEMBERS = [(ALICE, "a1"), (ALICE, "a2"), (BOB, "b1"), (CAROL, "c1")]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 8)), max_size=60))
def test_whoever_waits_is_passed_a_bounded_number_of_times(script: list[tuple[int, int]]) -> None:
    """Others come, go and are given much; b1 always waits, and gets its turn."""
    order = make_order(MEMBERS)
    present = list(MEMBERS)
    passed = 0
    for number, cost in script:
        member = MEMBERS[number]
        if member[1] != "b1" and number == 0:
            if member in present:
                present.remove(member)
                order.rest(*member)
            else:
                present.append(member)
                order.begin(*member)
        if serve(order, present, cost) == "b1":
            passed = 0
        else:
            passed += 1
        # Two other peers, each ahead by one service of at most 8 for its own of at least 1.
        assert passed <= 2 * 16
