from __future__ import annotations

from dataclasses import replace

import pytest
import sqlalchemy as sa

from pals.backend import schema
from pals.backend.database import reading, writing
from pals.backend.service import HINT_LIFE_S, BackendService
from pals.errors import (
    BackendFull,
    InvalidRecord,
    InviteRefused,
    StorageFailed,
    UnknownSwarm,
)
from pals.swarm.freshness import open_freshness
from pals.swarm.hints import sign_hint
from pals.swarm.records import decode_entry, digest
from pals.swarm.requests import WINDOW_S
from pals.swarm.roster import verify_chain
from pals.types import SwarmId
from tests.unit.backend.conftest import SIGNER
from tests.unit.backend.requests import Clock, append, invited, members, roster, signed, uses
from tests.unit.swarm.chains import NOW, Chain, identity

P, Q = identity(3), identity(4)
ADDRESS = "/ip4/10.0.0.5/tcp/4001"


def test_redeemed_invite_admits_the_peer(service: BackendService, chain: Chain) -> None:
    invite = invited(service, chain)
    join = chain.join(invite.signing_key, P)
    entry = service.redeem(chain.swarm_id, invite.auth, join)
    assert decode_entry(entry).record == join
    assert members(service, chain) == {chain.founder.peer_id, P.peer_id}


def test_repeated_calls_change_nothing(
    service: BackendService, chain: Chain, wall_clock: Clock
) -> None:
    invite = chain.invite()
    certificate, join = chain.certificate(invite), chain.join(invite.signing_key, P)
    first = append(service, chain, certificate)
    admitted = service.redeem(chain.swarm_id, invite.auth, join)
    wall_clock.now += 5
    before = service.entries(chain.swarm_id)
    assert append(service, chain, certificate) == first
    assert service.redeem(chain.swarm_id, invite.auth, join) == admitted
    assert decode_entry(service.create_swarm(chain.genesis)).received_at == NOW
    assert service.entries(chain.swarm_id) == before
    assert uses(service) == [1]


def test_etag_changes_with_the_chain(service: BackendService, chain: Chain) -> None:
    before = service.entries(chain.swarm_id)
    assert service.entries(chain.swarm_id, before.etag).entries is None
    invited(service, chain)
    after = service.entries(chain.swarm_id, before.etag)
    assert after.etag != before.etag
    assert after.entries is not None


def test_failed_redemption_uses_nothing(service: BackendService, chain: Chain) -> None:
    first, second = invited(service, chain), invited(service, chain)
    service.redeem(chain.swarm_id, first.auth, chain.join(first.signing_key, P))
    with pytest.raises(InvalidRecord, match="member already"):
        service.redeem(chain.swarm_id, second.auth, chain.join(second.signing_key, P))
    assert sorted(uses(service)) == [0, 1]


def test_two_services_over_one_database_agree(
    service: BackendService, chain: Chain, database_url: str, wall_clock: Clock
) -> None:
    other = BackendService(database_url, signer=SIGNER, clock=wall_clock)
    invite = invited(other, chain, max_uses=2)
    service.redeem(chain.swarm_id, invite.auth, chain.join(invite.signing_key, P))
    other.redeem(chain.swarm_id, invite.auth, chain.join(invite.signing_key, Q))
    assert service.entries(chain.swarm_id) == other.entries(chain.swarm_id)
    assert len(members(service, chain)) == 3
    other.close()


def test_records_outlive_a_restart(
    service: BackendService, chain: Chain, database_url: str, wall_clock: Clock
) -> None:
    invited(service, chain)
    before = service.entries(chain.swarm_id)
    service.close()
    again = BackendService(database_url, signer=SIGNER, clock=wall_clock)
    assert again.entries(chain.swarm_id) == before
    again.close()


def test_backend_stores_nothing_that_members_would_refuse(
    service: BackendService, chain: Chain
) -> None:
    evil, invite = identity(666), invited(service, chain, max_uses=5)
    before = service.entries(chain.swarm_id)
    for record in (
        chain.certificate(chain.invite(), signer=evil),
        chain.remove(chain.founder, joined=digest(chain.genesis), signer=evil),
        chain.join(invite.signing_key, P),
        chain.genesis,
        b"garbage",
    ):
        with pytest.raises(InvalidRecord):
            append(service, chain, record)
    for join in (
        chain.join(invite.signing_key, P, peer_signer=evil),
        chain.join(invite.signing_key, P, invite_signer=evil),
        chain.join(invite.signing_key, P, swarm_id=b"x" * 32),
        chain.certificate(invite),
        b"garbage",
    ):
        with pytest.raises(InvalidRecord):
            service.redeem(chain.swarm_id, invite.auth, join)
    with pytest.raises(InvalidRecord):
        service.create_swarm(chain.certificate(invite))
    assert service.entries(chain.swarm_id) == before


def test_failed_commit_leaves_nothing_behind(service: BackendService, chain: Chain) -> None:
    invite = invited(service, chain)
    before, join = service.entries(chain.swarm_id), chain.join(invite.signing_key, P)

    def fail(_: object) -> None:
        raise sa.exc.OperationalError("COMMIT", None, OSError("disk full"))

    sa.event.listen(service._engine, "commit", fail)
    with pytest.raises(StorageFailed):
        service.redeem(chain.swarm_id, invite.auth, join)
    sa.event.remove(service._engine, "commit", fail)
    assert service.entries(chain.swarm_id) == before
    service.redeem(chain.swarm_id, invite.auth, join)
    assert uses(service) == [1]
    assert P.peer_id in members(service, chain)


def test_revoked_invite_admits_nobody_else(service: BackendService, chain: Chain) -> None:
    invite = invited(service, chain, max_uses=2)
    join = chain.join(invite.signing_key, P)
    entry = service.redeem(chain.swarm_id, invite.auth, join)
    append(service, chain, chain.revoke(invite))
    with pytest.raises(InviteRefused):
        service.redeem(chain.swarm_id, invite.auth, chain.join(invite.signing_key, Q))
    assert service.redeem(chain.swarm_id, invite.auth, join) == entry
    assert members(service, chain) == {chain.founder.peer_id, P.peer_id}


def test_member_leaves_without_an_administrator(service: BackendService, chain: Chain) -> None:
    invite = invited(service, chain, max_uses=2)
    join = chain.join(invite.signing_key, P)
    service.redeem(chain.swarm_id, invite.auth, join)
    service.append_record(chain.swarm_id, chain.leave(P, joined=digest(join)), None)
    assert members(service, chain) == {chain.founder.peer_id}
    with pytest.raises(InvalidRecord, match="used this invite before"):
        service.redeem(chain.swarm_id, invite.auth, join)
    again = invited(service, chain)
    service.redeem(chain.swarm_id, again.auth, chain.join(again.signing_key, P))
    assert P.peer_id in members(service, chain)


def test_admin_administers_until_dismissed(service: BackendService, chain: Chain) -> None:
    invite = invited(service, chain)
    service.redeem(chain.swarm_id, invite.auth, chain.join(invite.signing_key, P))
    epoch = chain.epoch(1, signer=P)
    with pytest.raises(InvalidRecord, match="not signed by an administrator"):
        service.append_record(chain.swarm_id, epoch, signed(chain, epoch, signer=P))
    append(service, chain, chain.appoint(P.public_key))
    service.append_record(chain.swarm_id, epoch, signed(chain, epoch, signer=P))
    assert roster(service, chain).epoch == 1
    append(service, chain, chain.appoint(P.public_key, "none"))
    epoch = chain.epoch(2, signer=P)
    with pytest.raises(InvalidRecord, match="not signed by an administrator"):
        service.append_record(chain.swarm_id, epoch, signed(chain, epoch, signer=P))


def test_request_is_signed_new_and_made_once(
    service: BackendService, chain: Chain, database_url: str, wall_clock: Clock
) -> None:
    record, other = chain.certificate(chain.invite()), chain.certificate(chain.invite())
    request = signed(chain, record)
    refused = {
        "not signed by an administrator": [
            None,
            replace(request, authorization=""),
            signed(chain, record, signer=identity(666)),
        ],
        "not signed by whom it names": [
            replace(request, body=other),
            replace(request, method="PUT"),
            replace(request, path="/v1/swarms"),
        ],
        "its time differs": [
            signed(chain, record, at=NOW - WINDOW_S - 1),
            signed(chain, record, at=NOW + WINDOW_S + 1),
        ],
        "not base64url": [replace(request, authorization="%")],
    }
    for problem, requests in refused.items():
        for wrong in requests:
            with pytest.raises(InvalidRecord, match=problem):
                service.append_record(chain.swarm_id, record, wrong)
    assert len(service.entries(chain.swarm_id).entries or ()) == 1
    service.append_record(chain.swarm_id, record, request)
    restarted = BackendService(database_url, clock=wall_clock)
    for again in (service, restarted):
        with pytest.raises(InvalidRecord, match="made before"):
            again.append_record(chain.swarm_id, record, request)
    restarted.close()


def test_nonces_are_kept_no_longer_than_they_are_good(
    service: BackendService, chain: Chain, wall_clock: Clock
) -> None:
    for _ in range(3):
        record = chain.certificate(chain.invite())
        early = signed(chain, record, at=wall_clock.now + WINDOW_S)
        service.append_record(chain.swarm_id, record, early)
        wall_clock.now += 2 * WINDOW_S
        with pytest.raises(InvalidRecord, match="made before"):
            service.append_record(chain.swarm_id, record, early)
        wall_clock.now += 1
        with pytest.raises(InvalidRecord, match="time differs"):
            service.append_record(chain.swarm_id, record, early)
    append(service, chain, chain.epoch(1), at=wall_clock.now)
    with reading(service._engine) as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(schema.nonces)) == 1


def test_appointed_backend_signs_how_new_its_list_is(
    service: BackendService, chain: Chain, wall_clock: Clock
) -> None:
    assert service.entries(chain.swarm_id).freshness == b""
    append(service, chain, chain.appoint(service.public_key, "backend"))
    first = service.entries(chain.swarm_id)
    wall_clock.now += 60
    later = service.entries(chain.swarm_id, first.etag)
    assert later.entries is None
    known = roster(service, chain)
    for word, at in ((first.freshness, NOW), (later.freshness, NOW + 60)):
        assert open_freshness(word, known, now_unix=wall_clock.now).at == at


def test_freshness_is_about_the_entries_beside_it(
    service: BackendService, chain: Chain, database_url: str, wall_clock: Clock
) -> None:
    append(service, chain, chain.appoint(service.public_key, "backend"))
    other = BackendService(database_url, signer=SIGNER, clock=wall_clock)
    for _ in range(3):
        append(other, chain, chain.certificate(chain.invite()))
        listed = service.entries(chain.swarm_id)
        known = verify_chain(chain.swarm_id, listed.entries or ())
        open_freshness(listed.freshness, known, now_unix=wall_clock.now)
    other.close()


def test_changed_rows_are_not_passed_on(
    service: BackendService, chain: Chain, database_url: str
) -> None:
    invited(service, chain)
    forged = chain.entry(chain.certificate(chain.invite(), signer=identity(666)))
    with writing(service._engine, chain.swarm_id) as connection:
        connection.execute(
            schema.entries.update().where(schema.entries.c.seq == 1).values(entry=forged)
        )
    restarted = BackendService(database_url)
    with pytest.raises(StorageFailed, match="was changed"):
        restarted.entries(chain.swarm_id)
    restarted.close()


def test_unknown_swarm_is_named(service: BackendService, chain: Chain) -> None:
    unknown = SwarmId(b"u" * 32)
    certificate = chain.certificate(chain.invite())
    for call in (
        lambda: service.entries(unknown),
        lambda: service.hints(unknown),
        lambda: service.append_record(unknown, certificate, signed(chain, certificate)),
    ):
        with pytest.raises(UnknownSwarm) as caught:
            call()
        assert caught.value.fields["swarm"] == unknown.hex()


def test_swarms_are_bounded(database_url: str) -> None:
    service = BackendService(database_url, max_swarms=1)
    service.create_swarm(Chain().genesis)
    with pytest.raises(BackendFull):
        service.create_swarm(Chain(operator=identity(8)).genesis)
    service.close()


def test_newest_hint_of_each_live_member_is_kept(
    service: BackendService, chain: Chain, wall_clock: Clock
) -> None:
    invite = invited(service, chain)
    join = chain.join(invite.signing_key, P)
    service.redeem(chain.swarm_id, invite.auth, join)
    older, newer = (
        sign_hint(P, swarm_id=chain.swarm_id, addresses=(ADDRESS,), issued_at=at)
        for at in (NOW, NOW + 1)
    )
    service.put_hint(chain.swarm_id, newer)
    service.put_hint(chain.swarm_id, older)
    assert service.hints(chain.swarm_id) == (newer,)
    wall_clock.now += HINT_LIFE_S + 1
    assert service.hints(chain.swarm_id) == ()
    wall_clock.now -= HINT_LIFE_S
    append(service, chain, chain.remove(P, joined=digest(join)))
    assert service.hints(chain.swarm_id) == ()


def test_hint_of_a_stranger_is_refused(service: BackendService, chain: Chain) -> None:
    hint = sign_hint(Q, swarm_id=chain.swarm_id, addresses=(ADDRESS,), issued_at=NOW)
    with pytest.raises(InvalidRecord, match="no live member"):
        service.put_hint(chain.swarm_id, hint)
