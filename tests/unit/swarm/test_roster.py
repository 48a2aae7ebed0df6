"""What a backend that lies can and cannot do to the members' roster."""

from __future__ import annotations

import pytest

from pals.errors import InvalidRecord, RosterRefused, SwarmFull
from pals.swarm import roster as roster_module
from pals.swarm.records import digest
from pals.swarm.roster import verify_chain
from tests.unit.swarm.chains import NOW, Chain, identity, rechain, record_of

P, Q, EVIL = identity(3), identity(4), identity(666)


@pytest.fixture
def chain() -> Chain:
    return Chain()


def refused(chain: Chain, record: bytes, *, at: int = NOW) -> str:
    """Append ``record`` as a hacked backend would; return why peers refuse the list."""
    with pytest.raises(InvalidRecord) as caught:
        verify_chain(chain.swarm_id, [*chain.entries, chain.entry(record, at=at)])
    return str(caught.value.fields["problem"])


def test_founder_is_a_member_from_genesis(chain: Chain) -> None:
    assert chain.roster().members == {chain.founder.peer_id}
    assert chain.roster().seq == 0


def test_invited_peer_becomes_a_member(chain: Chain) -> None:
    chain.add_peer(P)
    assert chain.roster().members == {chain.founder.peer_id, P.peer_id}
    assert chain.roster().seq == 2


def test_removed_peer_is_no_member_and_may_be_invited_again(chain: Chain) -> None:
    join = chain.add_peer(P)
    chain.append(chain.remove(P, joined=digest(join)))
    assert P.peer_id not in chain.roster().members
    chain.add_peer(P)
    assert P.peer_id in chain.roster().members


def test_backend_cannot_add_its_own_peer(chain: Chain) -> None:
    invite = chain.invite()
    chain.append(chain.certificate(invite))
    forged = chain.join(invite.signing_key, EVIL, invite_signer=EVIL)
    assert refused(chain, forged) == "not signed by the invite"


def test_backend_cannot_mint_an_invite(chain: Chain) -> None:
    invite = chain.invite()
    assert refused(chain, chain.certificate(invite, signer=EVIL)) == "not signed by the operator"
    assert "no such invite" in refused(chain, chain.join(invite.signing_key, EVIL))


def test_joiner_cannot_register_a_foreign_peer_id(chain: Chain) -> None:
    invite = chain.invite()
    chain.append(chain.certificate(invite))
    stolen = chain.join(invite.signing_key, P, peer_signer=EVIL)
    assert refused(chain, stolen) == "not signed by the peer itself"


def test_backend_cannot_issue_an_invite_twice(chain: Chain) -> None:
    invite = chain.invite()
    certificate = chain.certificate(invite)
    chain.append(certificate)
    chain.append(chain.join(invite.signing_key, P))
    assert "used 1 times" in refused(chain, chain.join(invite.signing_key, Q))
    assert "already" in refused(chain, certificate)


def test_expired_invite_admits_nobody(chain: Chain) -> None:
    invite = chain.invite()
    chain.append(chain.certificate(invite, not_after=NOW + 10))
    join = chain.join(invite.signing_key, P)
    assert refused(chain, join, at=NOW + 11) == "the invite had expired"
    chain.append(join, at=NOW + 10)
    assert P.peer_id in chain.roster().members


def test_member_cannot_join_again(chain: Chain) -> None:
    chain.add_peer(P)
    invite = chain.invite()
    chain.append(chain.certificate(invite))
    assert "member already" in refused(chain, chain.join(invite.signing_key, P))


def test_removed_peer_cannot_come_back_with_what_it_knows(chain: Chain) -> None:
    invite = chain.invite()
    chain.append(chain.certificate(invite, max_uses=5))
    join = chain.join(invite.signing_key, P)
    chain.append(join)
    chain.append(chain.remove(P, joined=digest(join)))
    assert "used this invite before" in refused(chain, join)
    assert "closed" in refused(chain, chain.join(invite.signing_key, EVIL))


def test_only_the_operator_removes(chain: Chain) -> None:
    join = chain.add_peer(P)
    forged = chain.remove(P, joined=digest(join), signer=EVIL)
    assert refused(chain, forged) == "not signed by the operator"


def test_removal_is_not_used_again_after_a_new_invitation(chain: Chain) -> None:
    removal = chain.remove(P, joined=digest(chain.add_peer(P)))
    chain.append(removal)
    chain.add_peer(P)
    assert "no live membership" in refused(chain, removal)


def test_removal_cannot_be_moved_before_the_join(chain: Chain) -> None:
    join = chain.add_peer(P)
    chain.append(chain.remove(P, joined=digest(join)))
    genesis, certificate, joined, removed = map(record_of, chain.entries)
    for order in (
        [genesis, certificate, removed, joined],
        [genesis, removed, certificate, joined],
        [genesis, joined, certificate, removed],
    ):
        with pytest.raises(InvalidRecord):
            verify_chain(chain.swarm_id, rechain(order))


def test_record_of_another_swarm_is_refused(chain: Chain) -> None:
    invite, elsewhere = chain.invite(), b"e" * 32
    assert "another swarm" in refused(chain, chain.certificate(invite, swarm_id=elsewhere))
    chain.append(chain.certificate(invite))
    join = chain.join(invite.signing_key, P, swarm_id=elsewhere)
    assert "another swarm" in refused(chain, join)


def test_genesis_of_another_operator_is_refused(chain: Chain) -> None:
    other = Chain(operator=EVIL)
    with pytest.raises(InvalidRecord, match="another swarm"):
        verify_chain(chain.swarm_id, other.entries)
    assert "already" in refused(chain, other.genesis)


def test_chain_that_starts_without_genesis_is_refused(chain: Chain) -> None:
    invite = chain.certificate(chain.invite())
    with pytest.raises(InvalidRecord, match="not a genesis"):
        verify_chain(chain.swarm_id, rechain([invite]))


def test_missing_swapped_and_changed_entries_are_refused(chain: Chain) -> None:
    chain.add_peer(P)
    chain.add_peer(Q)
    e = chain.entries
    flipped = bytearray(e[2])
    flipped[10] ^= 1
    for lie in ([e[0], e[2]], [e[0], e[2], e[1]], e[1:], [*e, e[-1]], [*e[:2], bytes(flipped)]):
        with pytest.raises(InvalidRecord):
            verify_chain(chain.swarm_id, lie)


def test_empty_list_is_refused(chain: Chain) -> None:
    with pytest.raises(RosterRefused):
        verify_chain(chain.swarm_id, [])


def test_known_roster_is_continued(chain: Chain) -> None:
    known = chain.roster()
    chain.add_peer(P)
    continued = verify_chain(chain.swarm_id, chain.entries, known=known)
    assert continued == chain.roster()
    assert continued.extends(known)
    assert not known.extends(continued)


def test_shortened_or_forked_chain_is_refused_against_a_known_roster(chain: Chain) -> None:
    fork = Chain()
    chain.add_peer(P)
    fork.add_peer(Q)
    known = chain.roster()
    fork.add_peer(identity(5))
    for lie in (chain.entries[:-1], fork.entries[:3], fork.entries):
        with pytest.raises(RosterRefused) as caught:
            verify_chain(chain.swarm_id, lie, known=known)
        assert "entry 2" in str(caught.value.fields["problem"])


def test_full_swarm_admits_nobody(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster_module, "MAX_MEMBERS", 2)
    chain.add_peer(P)
    chain.add_peer(Q)
    with pytest.raises(SwarmFull) as caught:
        chain.roster()
    assert caught.value.fields["count"] == 2


def test_endless_chain_is_cut(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster_module, "MAX_ENTRIES", 2)
    assert "more than 2" in refused_after(chain)


def refused_after(chain: Chain) -> str:
    chain.append(chain.certificate(chain.invite()))
    return refused(chain, chain.certificate(chain.invite()))
