from __future__ import annotations

from pals.engine.admission import AdmissionLine, Candidate
from pals.engine.batch import BatchRules, SessionRequest
from pals.errors import AdmissionTimeout, DeadlineExceeded
from pals.types import PeerId, SessionId

ALICE, BOB = PeerId("12D3alice"), PeerId("12D3bob")
RULES = BatchRules(admission_wait_s=10.0)


def candidate(
    text: str, peer: PeerId, age: float, *, since: float = 0.0, deadline: float = float("inf")
) -> Candidate:
    request = SessionRequest(
        session=SessionId(text.encode().ljust(16, b"-")),
        peer=peer,
        prompt_tokens=10,
        max_tokens=20,
        deadline=deadline,
    )
    return Candidate(request=request, keys=(), seniority=(age, 0), has_yielded=False, since=since)


def make_line(*waiting: Candidate) -> AdmissionLine:
    line = AdmissionLine(RULES)
    for one in waiting:
        line.add(one)
    return line


def test_oldest_comes_first() -> None:
    old, young = candidate("a", ALICE, 1.0), candidate("b", BOB, 2.0)
    assert make_line(young, old).first() is old


def test_nobody_comes_first_in_an_empty_line() -> None:
    line = make_line()
    assert line.first() is None
    assert line.next_expiry() == float("inf")


def test_first_stays_first_whoever_comes() -> None:
    young = candidate("b", BOB, 2.0)
    line = make_line(young)
    assert line.first() is young
    line.add(candidate("a", ALICE, 1.0))
    assert line.first() is young


def test_peer_that_was_given_pages_comes_after_one_that_was_not() -> None:
    one, two, other = candidate("a", ALICE, 1), candidate("b", ALICE, 2), candidate("c", BOB, 3)
    line = make_line(one, two, other)
    line.take(one, 7)
    assert line.first() is other
    line.take(other, 1)
    assert line.first() is two


def test_removed_first_makes_way() -> None:
    one, two = candidate("a", ALICE, 1), candidate("b", ALICE, 2)
    line = make_line(one, two)
    assert line.first() is one
    assert line.remove(one.request.session) is one
    assert line.first() is two
    assert (len(line), line.count(ALICE), line.count(BOB)) == (1, 1, 0)


def test_those_who_waited_too_long_are_let_out_with_the_reason() -> None:
    slow = candidate("a", ALICE, 1, since=0.0)
    late = candidate("b", BOB, 2, since=4.0, deadline=6.0)
    line = make_line(slow, late)
    assert line.next_expiry() == 6.0
    assert line.expire(5.9) == []

    ((first, refused),) = line.expire(6.0)
    assert first is late
    assert isinstance(refused.error, DeadlineExceeded)

    ((second, refused),) = line.expire(10.0)
    assert second is slow
    assert isinstance(refused.error, AdmissionTimeout)
    assert refused.error.fields == {"tokens": 10, "waited_s": 10.0}
    assert len(line) == 0
