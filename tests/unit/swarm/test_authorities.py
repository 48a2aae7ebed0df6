"""Who may sign what: the operator, the admins it appoints, the backend, a member for itself."""

from __future__ import annotations

import pytest

from pals.errors import InvalidRecord
from pals.swarm.keys import secret_commitment
from pals.swarm.records import Remove, decode_record, digest
from pals.swarm.roster import MAX_APPOINTED, denies, verify_chain
from tests.unit.swarm.chains import SECRET, Chain, identity

P, Q, EVIL = identity(3), identity(4), identity(666)
BACKEND = identity(7)


@pytest.fixture
def chain() -> Chain:
    return Chain()


def refused(chain: Chain, record: bytes) -> str:
    with pytest.raises(InvalidRecord) as caught:
        verify_chain(chain.swarm_id, [*chain.entries, chain.entry(record)])
    return str(caught.value.fields["problem"])


def make_admin(chain: Chain) -> bytes:
    """Make ``P`` a member and an admin; return its join."""
    join = chain.add_peer(P)
    chain.append(chain.appoint(P.public_key))
    return join


def test_admin_signs_what_the_operator_signs_but_appoints_nobody(chain: Chain) -> None:
    make_admin(chain)
    joined = digest(chain.add_peer(Q))
    invite = chain.invite()

    chain.append(chain.certificate(invite, signer=P))
    chain.append(chain.revoke(invite, signer=P))
    chain.append(chain.remove(Q, joined=joined, signer=P))
    chain.append(chain.epoch(1, signer=P))

    assert chain.roster().may_administer(P.public_key)
    assert refused(chain, chain.appoint(P.public_key, signer=P)) == "not signed by the operator"


def test_admin_is_none_any_more_once_dismissed_or_removed(chain: Chain) -> None:
    joined = digest(make_admin(chain))
    for end in (chain.appoint(P.public_key, "none"), chain.remove(P, joined=joined)):
        entries = [*chain.entries, chain.entry(end)]
        roster = verify_chain(chain.swarm_id, entries)
        assert not roster.may_administer(P.public_key)


def test_only_a_member_becomes_admin_and_the_operator_stays(chain: Chain) -> None:
    assert "has to be a member" in refused(chain, chain.appoint(EVIL.public_key))
    own = chain.appoint(chain.operator.public_key, "none")
    assert "keeps its role" in refused(chain, own)


def test_backend_key_administers_nothing(chain: Chain) -> None:
    chain.append(chain.appoint(BACKEND.public_key, "backend"))
    assert chain.roster().authorities[BACKEND.public_key] == "backend"
    invite = chain.certificate(chain.invite(), signer=BACKEND)
    assert refused(chain, invite) == "not signed by the operator"


def test_appointments_are_bounded(chain: Chain) -> None:
    for number in range(MAX_APPOINTED):
        chain.append(chain.appoint(identity(100 + number).public_key, "backend"))
    one_more = chain.appoint(identity(99).public_key, "backend")
    assert f"more than {MAX_APPOINTED}" in refused(chain, one_more)
    chain.append(chain.appoint(identity(100).public_key, "none"))
    chain.append(one_more)
    assert identity(99).public_key in chain.roster().authorities


def test_revoked_invite_admits_nobody_and_keeps_who_came_by_it(chain: Chain) -> None:
    invite = chain.invite()
    chain.append(chain.certificate(invite, max_uses=2))
    chain.append(chain.join(invite.signing_key, P))
    chain.append(chain.revoke(invite))
    assert P.peer_id in chain.roster().members
    assert "closed" in refused(chain, chain.join(invite.signing_key, Q))
    assert "no such open invite" in refused(chain, chain.revoke(invite))


def test_member_leaves_by_its_own_signature_alone(chain: Chain) -> None:
    joined = digest(chain.add_peer(P))
    assert "peer itself" in refused(chain, chain.leave(P, joined=joined, signer=EVIL))
    chain.append(chain.leave(P, joined=joined))
    assert P.peer_id not in chain.roster().members
    assert "no live membership" in refused(chain, chain.leave(P, joined=joined))


def test_epochs_follow_one_another_and_commit_to_their_secret(chain: Chain) -> None:
    assert chain.roster().commitment == secret_commitment(0, SECRET.reveal())
    assert "does not follow epoch 0" in refused(chain, chain.epoch(2))
    chain.append(chain.epoch(1, secret=b"s" * 32))
    roster = chain.roster()
    assert (roster.epoch, roster.commitment) == (1, secret_commitment(1, b"s" * 32))
    assert "does not follow epoch 1" in refused(chain, chain.epoch(1))
    assert refused(chain, chain.epoch(2, signer=EVIL)) == "not signed by the operator"


def test_removal_denies_before_the_chain_holds_it(chain: Chain) -> None:
    joined = digest(chain.add_peer(P))
    roster = chain.roster()

    def loose(record: bytes) -> Remove:
        decoded = decode_record(record)
        assert isinstance(decoded, Remove)
        return decoded

    assert denies(roster, loose(chain.remove(P, joined=joined))) == P.peer_id
    assert denies(roster, loose(chain.remove(P, joined=bytes(32)))) is None
    assert denies(roster, loose(chain.remove(Q, joined=joined))) is None
    with pytest.raises(InvalidRecord, match="not signed"):
        denies(roster, loose(chain.remove(P, joined=joined, signer=EVIL)))
