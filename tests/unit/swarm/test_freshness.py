from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from pals.errors import InvalidRecord
from pals.swarm.freshness import (
    MAX_CLOCK_SKEW_S,
    decode_freshness,
    open_freshness,
    sign_freshness,
)
from tests.unit.swarm.chains import NOW, Chain, identity

ADMIN, BACKEND, EVIL = identity(3), identity(7), identity(666)


@pytest.fixture
def chain() -> Chain:
    chain = Chain()
    chain.add_peer(ADMIN)
    chain.append(chain.appoint(ADMIN.public_key))
    chain.append(chain.appoint(BACKEND.public_key, "backend"))
    return chain


def refusal(chain: Chain, data: bytes, *, now_unix: float = NOW) -> str:
    with pytest.raises(InvalidRecord) as caught:
        open_freshness(data, chain.roster(), now_unix=now_unix)
    return str(caught.value.fields["problem"])


@pytest.mark.parametrize("number", [1, 3, 7], ids=["operator", "admin", "backend"])
def test_each_authority_may_say_that_a_list_is_fresh(chain: Chain, number: int) -> None:
    word = sign_freshness(identity(number), chain.roster(), at=NOW)
    opened = open_freshness(word, chain.roster(), now_unix=NOW + 30)
    assert opened.age_s(NOW + 30) == 30


def test_clock_that_is_ahead_makes_no_negative_age(chain: Chain) -> None:
    word = sign_freshness(BACKEND, chain.roster(), at=NOW + MAX_CLOCK_SKEW_S)
    assert open_freshness(word, chain.roster(), now_unix=NOW).age_s(NOW) == 0
    late = sign_freshness(BACKEND, chain.roster(), at=NOW + MAX_CLOCK_SKEW_S + 1)
    assert "ahead of this machine's clock" in refusal(chain, late)


def test_stranger_and_dismissed_key_say_nothing(chain: Chain) -> None:
    assert "no authority" in refusal(chain, sign_freshness(EVIL, chain.roster(), at=NOW))
    chain.append(chain.appoint(BACKEND.public_key, "none"))
    assert "no authority" in refusal(chain, sign_freshness(BACKEND, chain.roster(), at=NOW))


def test_word_is_about_one_state_of_one_swarm(chain: Chain) -> None:
    older = sign_freshness(BACKEND, chain.roster(), at=NOW)
    chain.add_peer(identity(9))
    assert "is about entry" in refusal(chain, older)
    other = Chain(operator=identity(50))
    assert "another swarm" in refusal(other, older)


def test_changed_word_is_refused(chain: Chain) -> None:
    word = decode_freshness(sign_freshness(BACKEND, chain.roster(), at=NOW))
    for changed in (replace(word, at=NOW + 1), replace(word, signer=ADMIN.public_key)):
        assert "not signed" in refusal(chain, msgspec.msgpack.encode(changed))
