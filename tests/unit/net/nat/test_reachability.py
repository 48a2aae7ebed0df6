from __future__ import annotations

import pytest

from pals.net.nat.addresses import Endpoint, meeting_address
from pals.net.nat.reachability import REPORT_LIFETIME_S, Reachability, Report
from pals.types import PeerId

ME, A, B, C, D = (PeerId(name) for name in ("ME", "A", "B", "C", "D"))
LAN = Endpoint("10.0.0.5", 4001)
PUBLIC = Endpoint("203.0.113.7", 4001)
LIE = "198.51.100.66"


def behind_nat(**settings) -> Reachability:
    return Reachability(local=ME, listening=(LAN,), **settings)


def report(ip: str = PUBLIC.ip, *reached: int, asked=(4001,), at_s: float = 0.0) -> Report:
    return Report(Endpoint(ip, 50_000), frozenset(asked), frozenset(reached), at_s)


def test_nothing_is_known_before_anybody_said_anything():
    state = behind_nat()

    assert state.reach == "unknown"
    assert state.public_ip is None
    assert state.addresses([A]) == (str(LAN),)


def test_a_machine_that_was_dialled_from_outside_is_public_and_says_where():
    state = behind_nat()
    state.record(A, report(PUBLIC.ip, 4001))

    assert state.reach == "public"
    assert state.addresses([A]) == (str(PUBLIC), str(LAN))


def test_a_machine_that_could_not_be_dialled_is_private_and_says_where_to_meet():
    state = behind_nat()
    state.record(A, report())

    assert state.reach == "private"
    places = [meeting_address(m, ME) for m in (A, B, C)]
    assert state.addresses([A, ME, B, C, D]) == (str(LAN), *places)


def test_a_member_of_the_same_network_says_nothing_about_the_outside():
    state = behind_nat()
    state.record(A, report("10.0.0.9", 4001))

    assert state.reach == "unknown"
    assert state.verified() == ()


def test_a_member_that_was_asked_for_no_port_says_nothing_about_the_reach():
    state = behind_nat()
    state.record(A, report(asked=()))

    assert state.reach == "unknown"
    assert state.public_ip == PUBLIC.ip


def test_the_address_that_most_members_see_counts():
    state = behind_nat()
    state.record(A, report(LIE, 4001))
    state.record(B, report(PUBLIC.ip, 4001))
    state.record(C, report(PUBLIC.ip))

    assert state.public_ip == PUBLIC.ip
    assert state.verified() == (PUBLIC,)


def test_a_new_report_replaces_that_of_the_same_member():
    state = behind_nat()
    state.record(A, report(PUBLIC.ip, 4001))
    state.record(A, report(at_s=1.0))

    assert state.reach == "private"


def test_old_reports_are_forgotten():
    state = behind_nat()
    state.record(A, report(PUBLIC.ip, 4001))
    state.record(B, report(at_s=REPORT_LIFETIME_S + 1))

    assert state.reach == "private"


def test_what_the_user_announces_is_told_first_whatever_members_find():
    forward = "/dns4/home.example.org/tcp/4001"
    state = behind_nat(announced=(forward,))
    state.record(A, report())

    assert state.addresses([A]) == (forward, str(LAN), meeting_address(A, ME))


def test_members_are_asked_to_dial_the_ports_that_the_user_announces():
    state = behind_nat(announced=("/ip4/203.0.113.7/tcp/80", "/dns4/home.example.org/tcp/81"))

    assert state.ports_to_try() == (80, 81, 4001)


def test_a_port_that_the_router_forwards_is_told_until_members_find_it_closed():
    state = behind_nat()
    state.mapped = Endpoint(PUBLIC.ip, 20_001)

    assert str(state.mapped) in state.addresses([])
    assert state.ports_to_try() == (20_001, 4001)
    state.record(A, report(asked=(4001,)))
    assert str(state.mapped) in state.addresses([])
    state.record(A, report(asked=(20_001, 4001)))
    assert str(state.mapped) not in state.addresses([])
    state.record(B, report(PUBLIC.ip, 20_001, asked=(20_001, 4001)))
    assert state.addresses([])[0] == str(state.mapped)


def test_a_peer_finds_this_machine_by_its_listening_port_or_by_what_was_seen():
    seen = Endpoint(PUBLIC.ip, 50_000)

    assert behind_nat().punching_endpoints([seen]) == (PUBLIC, seen)


def test_the_other_family_of_addresses_has_other_ports():
    seen = Endpoint("2001:db8::1", 50_000)

    assert behind_nat().punching_endpoints([seen]) == (seen,)


@pytest.mark.parametrize("count", [1, 5])
def test_no_more_ports_are_asked_for_than_a_question_takes(count):
    listening = tuple(Endpoint("10.0.0.5", 4001 + n) for n in range(count))

    assert len(Reachability(local=ME, listening=listening).ports_to_try()) == min(count, 3)
