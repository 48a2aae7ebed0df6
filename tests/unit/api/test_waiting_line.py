from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.api.waiting_line import MAX_RETRY_AFTER_S, LineLimits, WaitingLine
from pals.errors import RateLimitExceeded

ONE = LineLimits(running=1, waiting=4)


def waiting(line: WaitingLine, *clients: str) -> dict[int, str]:
    """Let requests of clients arrive, after one that runs; return those that wait by tickets."""
    line.arrive(0, "first", 0.0)
    tickets = dict(enumerate(clients, 1))
    for ticket, client in tickets.items():
        assert not line.arrive(ticket, client, 0.0).runs
    return tickets


def served(line: WaitingLine, tickets: dict[int, str]) -> list[str]:
    """End what runs again and again; return whose turn it was."""
    order: list[str] = []
    running: int | None = 0
    while (running := line.leave(running, 0.0)) is not None:
        order.append(tickets[running])
    return order


def test_requests_run_up_to_the_limit_then_wait_then_are_refused() -> None:
    line = WaitingLine(LineLimits(running=2, waiting=1))

    assert [line.arrive(ticket, "a", 0.0).runs for ticket in range(3)] == [True, True, False]
    with pytest.raises(RateLimitExceeded):
        line.arrive(3, "a", 0.0)
    assert (line.running, line.waiting) == (2, 1)


def test_a_place_that_becomes_free_goes_to_who_waits() -> None:
    line = WaitingLine(ONE)
    waiting(line, "a", "b")

    assert line.leave(0, 0.0) == 1
    assert line.leave(1, 0.0) == 2
    assert line.leave(2, 0.0) is None
    assert (line.running, line.waiting) == (0, 0)


def test_clients_take_turns_however_many_requests_one_has() -> None:
    line = WaitingLine(LineLimits(running=1, waiting=9))

    tickets = waiting(line, "a", "a", "a", "a", "b", "b", "c")

    assert served(line, tickets) == ["a", "b", "c", "a", "b", "a", "a"]


def test_whoever_runs_least_is_next() -> None:
    line = WaitingLine(LineLimits(running=3, waiting=9))
    for ticket, client in enumerate(["a", "a", "b"]):
        line.arrive(ticket, client, 0.0)
    line.arrive(3, "a", 0.0)
    line.arrive(4, "b", 0.0)

    assert line.leave(0, 0.0) == 3, "each of them runs one then, and a was served longer ago"
    assert line.leave(3, 0.0) == 4


def test_a_newcomer_displaces_the_newest_of_whoever_waits_most() -> None:
    line = WaitingLine(ONE)
    waiting(line, "a", "a", "a", "b")

    arrival = line.arrive(9, "c", 0.0)

    assert (arrival.runs, arrival.displaced) == (False, 3)
    assert line.waiting == 4
    assert line.leave(3, 0.0) is None, "it is known no more"


def test_nobody_is_displaced_for_an_equal() -> None:
    line = WaitingLine(ONE)
    waiting(line, "a", "a", "b", "b")

    for client in ("a", "b"):
        with pytest.raises(RateLimitExceeded):
            line.arrive(9, client, 0.0)
    assert line.arrive(10, "c", 0.0).displaced is not None


def test_one_that_waits_no_more_is_passed_over() -> None:
    line = WaitingLine(ONE)
    waiting(line, "a", "b")

    assert line.leave(1, 0.0) is None
    assert line.leave(0, 0.0) == 2


def test_no_waiting_at_all_can_be_asked_for() -> None:
    line = WaitingLine(LineLimits(running=1, waiting=0))
    line.arrive(0, "a", 0.0)

    with pytest.raises(RateLimitExceeded):
        line.arrive(1, "b", 0.0)


def test_the_advised_wait_follows_how_long_requests_run() -> None:
    line = WaitingLine(ONE)
    for ticket in range(100):
        line.arrive(ticket, "a", 20.0 * ticket)
        line.leave(ticket, 20.0 * ticket + 10)
    assert line.refusal().fields["retry_after_s"] == 10
    waiting(line, "a", "a")
    assert line.refusal().fields["retry_after_s"] == 30
    line.leave(0, 1e6)
    assert line.refusal().fields["retry_after_s"] == MAX_RETRY_AFTER_S


@given(
    st.builds(LineLimits, running=st.integers(1, 4), waiting=st.integers(0, 5)),
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 60))),
)
def test_every_request_runs_waits_or_is_refused_and_nothing_is_kept_of_it(
    limits: LineLimits, events: list[tuple[str, int]]
) -> None:
    line = WaitingLine(limits)
    state: dict[int, str] = {}
    for ticket, (client, leaving) in enumerate(events):
        try:
            arrival = line.arrive(ticket, client, float(ticket))
        except RateLimitExceeded:
            assert line.waiting == limits.waiting
        else:
            state[ticket] = "runs" if arrival.runs else "waits"
            if arrival.displaced is not None:
                assert state.pop(arrival.displaced) == "waits"
        following = line.leave(leaving, float(ticket))
        state.pop(leaving, None)
        if following is not None:
            assert state[following] == "waits"
            state[following] = "runs"
        counts = Counter(state.values())
        assert (line.running, line.waiting) == (counts["runs"], counts["waits"])
        assert line.running <= limits.running
        assert line.waiting <= limits.waiting
        assert not line.waiting or line.running == limits.running
    for ticket in range(len(events)):
        line.leave(ticket, 1e3)
    assert (line.running, line.waiting) == (0, 0)
    assert line.clients == 0
