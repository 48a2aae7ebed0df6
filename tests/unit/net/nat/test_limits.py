from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.errors import RelayRefused
from pals.net.nat.limits import Allowance, CircuitBook, PeerAllowances, RelayLimits
from pals.types import PeerId

A, B, C, D, R = (PeerId(name) for name in "ABCDR")


def book(**limits: float) -> CircuitBook:
    return CircuitBook(RelayLimits(**limits))


def test_an_allowance_gives_its_burst_and_then_its_rate():
    allowance = Allowance(rate=2.0, burst=3.0)

    assert [allowance.try_take(1, 0.0) for _ in range(4)] == [True, True, True, False]
    assert [allowance.try_take(1, 0.5) for _ in range(2)] == [True, False]


def test_what_is_more_than_the_burst_is_paid_for_by_waiting():
    allowance = Allowance(rate=100.0, burst=50.0)

    assert allowance.take(50, 0.0) == 0.0
    assert allowance.take(200, 0.0) == 2.0
    assert allowance.take(100, 2.0) == 1.0


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 1000)), max_size=50))
def test_no_more_than_burst_and_rate_goes_through_in_any_time(steps):
    allowance, now, done = Allowance(rate=100.0, burst=50.0), 0.0, 0
    for pause, amount in steps:
        now += pause
        now += allowance.take(amount, now)
        done += amount
        assert done <= 50.0 + 100.0 * now + 1e-6


def test_one_peer_does_not_use_up_what_another_has():
    allowances = PeerAllowances(rate=1.0, burst=1.0)

    assert allowances.try_take(A, 0.0)
    assert not allowances.try_take(A, 0.0)
    assert allowances.try_take(B, 0.0)


def test_peers_that_are_remembered_are_limited():
    allowances = PeerAllowances(rate=1.0, burst=1.0, most=2)

    assert allowances.try_take(A, 0.0)
    assert allowances.try_take(B, 0.0)
    assert allowances.try_take(C, 0.0)
    assert not allowances.try_take(B, 0.0)
    assert allowances.try_take(A, 0.0)  # forgotten, and so new


def test_circuits_are_limited_in_all():
    circuits = book(max_circuits=2)
    first = circuits.open(A, B, relay=R, now_s=0.0)
    circuits.open(C, D, relay=R, now_s=0.0)

    with pytest.raises(RelayRefused, match="2 circuits"):
        circuits.open(A, C, relay=R, now_s=0.0)
    circuits.close(first)
    circuits.open(A, C, relay=R, now_s=0.0)


@pytest.mark.parametrize("ends", [(A, D), (D, A)])
def test_circuits_are_limited_for_a_peer_at_either_end(ends):
    circuits = book(max_circuits_per_peer=2)
    circuits.open(A, B, relay=R, now_s=0.0)
    circuits.open(C, A, relay=R, now_s=0.0)

    with pytest.raises(RelayRefused, match="peer A has 2 circuits"):
        circuits.open(*ends, relay=R, now_s=0.0)


def test_a_circuit_of_a_peer_to_itself_is_refused():
    with pytest.raises(RelayRefused, match="same peer"):
        book().open(A, A, relay=R, now_s=0.0)


def test_bytes_are_held_back_for_their_sender_and_for_all():
    circuits = book(bytes_per_s=100.0, peer_bytes_per_s=50.0)
    circuit = circuits.open(A, B, relay=R, now_s=0.0)

    assert circuits.charge(circuit, A, 50, 0.0) == pytest.approx((50 - 12.5) / 50)
    assert circuits.charge(circuit, B, 50, 0.0) == pytest.approx((100 - 25) / 100)
    assert circuit.carried_bytes == 100


def test_a_byte_keeps_a_circuit_from_being_idle():
    circuits = book()
    circuit = circuits.open(A, B, relay=R, now_s=1.0)

    circuits.charge(circuit, A, 1, 7.0)

    assert circuit.last_byte_s == 7.0
