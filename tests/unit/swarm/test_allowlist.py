from __future__ import annotations

import pytest

from pals.errors import RosterRefused
from pals.swarm.allowlist import FRESH_S, AllowList
from pals.swarm.records import digest
from tests.unit.swarm.chains import Chain, identity

P = identity(3)


@pytest.fixture
def chain() -> Chain:
    chain = Chain()
    chain.add_peer(P)
    return chain


def test_no_list_allows_nobody() -> None:
    allow_list = AllowList()
    assert allow_list.state(0) == "none"
    assert not allow_list.allows(P.peer_id, 0)


@pytest.mark.parametrize(
    ("age_s", "state", "allowed"),
    [
        (0, "fresh", True),
        (FRESH_S, "fresh", True),
        (FRESH_S + 1, "stale", True),
        (1000, "stale", True),
        (1001, "expired", False),
    ],
)
def test_list_ages_from_fresh_to_expired(
    chain: Chain, age_s: float, state: str, allowed: bool
) -> None:
    allow_list = AllowList(max_stale_s=1000)
    allow_list.update(chain.roster(), 50, age_s=0)
    assert allow_list.state(50 + age_s) == state
    assert allow_list.allows(P.peer_id, 50 + age_s) is allowed
    assert not allow_list.allows(identity(9).peer_id, 50)


def test_expired_list_recovers_when_it_is_verified_again(chain: Chain) -> None:
    allow_list = AllowList(max_stale_s=100)
    allow_list.update(chain.roster(), 0, age_s=0)
    assert not allow_list.allows(P.peer_id, 101)
    allow_list.update(chain.roster(), 200, age_s=0)
    assert allow_list.allows(P.peer_id, 200)


def test_saved_list_keeps_its_age(chain: Chain) -> None:
    allow_list = AllowList(max_stale_s=100)
    allow_list.update(chain.roster(), 10, age_s=95)
    assert allow_list.state(10) == "stale"
    assert allow_list.state(16) == "expired"


def test_removed_peer_is_no_longer_allowed() -> None:
    chain = Chain()
    join = chain.add_peer(P)
    allow_list = AllowList()
    allow_list.update(chain.roster(), 0, age_s=0)
    chain.append(chain.remove(P, joined=digest(join)))
    allow_list.update(chain.roster(), 1, age_s=0)
    assert not allow_list.allows(P.peer_id, 1)


def test_rollback_and_fork_are_refused_and_change_nothing(chain: Chain) -> None:
    older = Chain().roster()
    fork = Chain()
    fork.add_peer(identity(9))
    fork.add_peer(identity(10))
    allow_list = AllowList(max_stale_s=1000)
    held = chain.roster()
    allow_list.update(held, 0, age_s=0)
    for lie in (older, fork.roster()):
        with pytest.raises(RosterRefused):
            allow_list.update(lie, 500, age_s=0)
    assert allow_list.roster is held
    assert allow_list.state(500) == "stale"
