"""The ledger's decisions, and what no order of events makes it do."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.errors import InvalidRecord
from pals.swarm.allowlist import FRESH_S, AllowList
from pals.swarm.freshness import sign_freshness
from pals.swarm.identity import Identity
from pals.swarm.ledger import RENEW_S, Ask, Cut, End, Ledger, Save, Seek, Tell, Warn
from pals.swarm.news import News
from pals.swarm.records import digest
from pals.swarm.roster import verify_chain
from pals.types import PeerId
from tests.unit.swarm.chains import NOW, SECRET, Chain, identity

BACKEND, ADMIN, P, Q, EVIL = (identity(n) for n in (77, 3, 4, 5, 666))
NEXT = digest(b"next")


def make_chain() -> Chain:
    chain = Chain()
    chain.append(chain.appoint(BACKEND.public_key, "backend"))
    for who in (ADMIN, P, Q):
        chain.add_peer(who)
    chain.append(chain.appoint(ADMIN.public_key))
    return chain


def make_ledger(chain: Chain, own: Identity = Q, **options: object) -> Ledger:
    allow_list = AllowList(max_stale_s=1000)
    allow_list.update(chain.roster(), 0, age_s=None)
    ledger = Ledger(
        own=own.peer_id,
        allow_list=allow_list,
        entries=tuple(chain.entries),
        epoch=0,
        rng=random.Random(0),
        **options,  # type: ignore[arg-type]
    )
    ledger.renew(word(chain, at=NOW), 0, NOW)
    return ledger


def word(chain: Chain, *, at: float, signer: Identity = BACKEND) -> bytes:
    return sign_freshness(signer, chain.roster(), at=int(at))


def removal(chain: Chain, who: Identity, signer: Identity | None = None) -> bytes:
    joined = chain.roster().live[who.peer_id].joined
    return chain.remove(who, joined=joined, signer=signer)


def news_of(chain: Chain, **values: object) -> News:
    roster = chain.roster()
    fields = {"seq": roster.seq, "head": roster.head, "epoch": 0} | values
    return News(**fields)  # type: ignore[arg-type]


def test_a_removal_on_the_list_cuts_saves_and_tells() -> None:
    chain = make_chain()
    ledger = make_ledger(chain)
    chain.append(removal(chain, P))
    chain.append(chain.epoch(1, secret=NEXT))
    actions = ledger.adopt(tuple(chain.entries), chain.roster(), 5)
    assert actions == [Cut(P.peer_id), Seek(1), Save(), Tell()]


def test_whoever_is_removed_ends() -> None:
    chain = make_chain()
    ledger = make_ledger(chain, own=P)
    chain.append(removal(chain, P))
    assert End() in ledger.adopt(tuple(chain.entries), chain.roster(), 5)
    other = make_chain()
    loose = make_ledger(other, own=P)
    assert loose.deny(removal(other, P))[0] == End()


@pytest.mark.parametrize("signer", [None, ADMIN])
def test_a_loose_removal_of_an_administrator_holds_before_the_chain_has_it(
    signer: Identity | None,
) -> None:
    chain = make_chain()
    ledger = make_ledger(chain)
    record = removal(chain, P, signer)
    assert ledger.deny(record) == [Cut(P.peer_id), Save(), Tell()]
    assert not ledger.allow_list.allows(P.peer_id, 1)
    assert ledger.deny(record) == []
    assert ledger.news().removals == (record,)
    chain.append(record)
    actions = ledger.adopt(tuple(chain.entries), chain.roster(), 5)
    assert Cut(P.peer_id) not in actions
    assert ledger.news().removals == ()


@pytest.mark.parametrize("signer", [P, EVIL, BACKEND])
def test_a_removal_that_no_administrator_signed_is_refused(signer: Identity) -> None:
    chain = make_chain()
    ledger = make_ledger(chain)
    with pytest.raises(InvalidRecord):
        ledger.deny(removal(chain, P, signer))
    forward, actions = ledger.heard(
        P.peer_id, news_of(chain, removals=(removal(chain, P, signer),)), 1, NOW + 1
    )
    assert (forward, actions) == (False, [])
    assert ledger.allow_list.allows(P.peer_id, 1)


def test_other_records_are_no_removals() -> None:
    chain = make_chain()
    with pytest.raises(InvalidRecord):
        make_ledger(chain).deny(chain.epoch(1))


def test_a_member_that_comes_anew_is_not_denied_by_its_old_removal() -> None:
    chain = make_chain()
    ledger = make_ledger(chain)
    record = removal(chain, P)
    ledger.deny(record)
    chain.append(record)
    chain.add_peer(P)
    ledger.adopt(tuple(chain.entries), chain.roster(), 5)
    assert ledger.allow_list.allows(P.peer_id, 5)
    assert ledger.deny(record) == []


def test_a_member_that_is_ahead_is_asked_and_one_that_is_behind_is_told() -> None:
    chain = make_chain()
    ledger, before = make_ledger(chain), news_of(chain)
    chain.append(chain.certificate(chain.invite()))
    assert ledger.heard(P.peer_id, news_of(chain), 1, NOW) == (True, [Ask(P.peer_id)])
    ledger.adopt(tuple(chain.entries), chain.roster(), 2)
    assert ledger.heard(P.peer_id, before, 3, NOW) == (False, [])  # it was told just now
    assert ledger.heard(P.peer_id, before, 30, NOW) == (True, [Tell()])


@pytest.mark.parametrize("signer", [P, EVIL])
def test_freshness_of_nobody_with_authority_renews_nothing_and_goes_no_further(
    signer: Identity,
) -> None:
    chain = make_chain()
    ledger = make_ledger(chain)
    told = news_of(chain, freshness=word(chain, at=NOW + 500, signer=signer))
    assert ledger.heard(P.peer_id, told, 500, NOW + 500) == (False, [])
    assert ledger.allow_list.age_s(500) == 500


def test_a_claimed_other_head_is_believed_only_from_an_authority() -> None:
    chain = make_chain()
    ledger = make_ledger(chain)
    claim = news_of(chain, head=bytes(32))
    assert ledger.heard(P.peer_id, claim, 1, NOW) == (False, [])
    fork = make_chain()  # its invites have other keys
    told = news_of(fork, freshness=word(fork, at=NOW))
    forward, [warning] = ledger.heard(P.peer_id, told, 1, NOW)
    assert forward
    assert isinstance(warning, Warn)
    assert warning.alarm.kind == "fork"
    assert ledger.heard(P.peer_id, told, 2, NOW)[1] == []


def test_entries_that_do_not_follow_are_a_fork_only_with_a_signed_head() -> None:
    chain, fork = make_chain(), make_chain()
    ledger = make_ledger(chain)
    fork.append(fork.certificate(fork.invite()))
    after = fork.entries[len(chain.entries) :]
    signed = news_of(fork, freshness=word(fork, at=NOW))
    unsigned = news_of(fork, freshness=word(fork, at=NOW, signer=EVIL))
    assert ledger.departed(P.peer_id, unsigned, after, NOW) == []
    assert ledger.departed(P.peer_id, signed, after[:0], NOW) == []
    assert ledger.departed(P.peer_id, signed, [b"\x00"], NOW) == []
    assert [type(a) for a in ledger.departed(P.peer_id, signed, after, NOW)] == [Warn]


def test_an_authority_renews_every_minute_and_tells() -> None:
    chain = make_chain()
    ledger = make_ledger(chain, own=ADMIN, signers=(ADMIN,))
    for minute in range(1, 100):
        now = minute * RENEW_S
        assert Tell() in ledger.tick(now, NOW + now)
        assert ledger.allow_list.age_s(now) < 1
    news = ledger.news()
    listener = make_ledger(chain)
    listener.heard(ADMIN.peer_id, news, now, NOW + now)
    assert listener.allow_list.age_s(now) < 1


def test_an_authority_renews_no_list_that_expired_by_either_clock() -> None:
    for now, now_unix in ((1001, NOW + 1001), (100, NOW + 40 * 86400)):
        ledger = make_ledger(make_chain(), own=ADMIN, signers=(ADMIN,))
        ledger.tick(now, now_unix)
        assert ledger.allow_list.age_s(now) == now


def test_a_member_is_silent_while_others_say_the_same() -> None:
    chain = make_chain()
    ledger = make_ledger(chain)
    assert ledger.tick(0, NOW) == [Tell()]
    told = news_of(chain, freshness=word(chain, at=NOW + 40))
    ledger.heard(P.peer_id, told, 45, NOW + 45)
    assert ledger.tick(75, NOW + 75) == []
    assert Tell() in ledger.tick(200, NOW + 200)


def test_only_the_secret_that_was_committed_to_is_taken() -> None:
    chain = make_chain()
    ledger = make_ledger(chain)
    chain.append(chain.epoch(1, secret=NEXT))
    ledger.adopt(tuple(chain.entries), chain.roster(), 5)
    for epoch, secret in ((1, SECRET.reveal()), (0, SECRET.reveal()), (2, NEXT)):
        with pytest.raises(InvalidRecord):
            ledger.enter(epoch, secret, 6)
    assert ledger.epoch == 0
    assert ledger.enter(1, NEXT, 6) == [Tell()]
    assert ledger.news().epoch == 1


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["wait", "renew", "replay", "evil", "grow", "kick", "loose", "shift"]),
        st.integers(0, 900),
    ),
    max_size=25,
)


@settings(max_examples=30)
@given(EVENTS)
def test_no_order_of_events_widens_access(events: list[tuple[str, int]]) -> None:
    """Whoever may connect is listed and not removed, and an honest word is young enough.

    The model keeps when an authority really said that the list was the newest; the wall
    clock of the member jumps, and old words are played again.
    """
    chain, removed = make_chain(), set[PeerId]()
    ledger = make_ledger(chain)
    now, offset, said_at = 0.0, 0.0, 0.0
    words = [word(chain, at=NOW)]
    for event, number in events:
        wall = NOW + now + offset
        match event:
            case "wait":
                now += number
            case "shift":
                offset = (number - 450) * 8000.0
            case "renew":
                words.append(word(chain, at=NOW + now))
                ledger.heard(P.peer_id, news_of(chain, freshness=words[-1]), now, wall)
                said_at = now
            case "replay":
                ledger.renew(words[number % len(words)], now, wall)
            case "evil":
                ledger.renew(word(chain, at=wall, signer=EVIL), now, wall)
            case "grow":
                chain.append(chain.certificate(chain.invite()))
                ledger.adopt(tuple(chain.entries), chain.roster(), now)
            case "kick" | "loose":
                live = sorted(chain.roster().live.keys() - {chain.founder.peer_id, Q.peer_id})
                if live:
                    who = next(i for i in (ADMIN, P) if i.peer_id == live[number % len(live)])
                    removed.add(who.peer_id)
                    chain.append(removal(chain, who))
                    if event == "loose":
                        ledger.deny(chain.remove(who, joined=joined_of(ledger, who)))
                    ledger.adopt(tuple(chain.entries), chain.roster(), now)
        allowed = ledger.allow_list.members(now)
        assert not allowed & removed
        assert allowed <= chain.roster().members
        if now - said_at > 1000:
            assert allowed == frozenset()
        if now - said_at > FRESH_S:
            assert ledger.allow_list.state(now) != "fresh"


def joined_of(ledger: Ledger, who: Identity) -> bytes:
    return verify_chain(ledger.roster.swarm_id, ledger.entries).live[who.peer_id].joined
