from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from pals.backend import schema
from pals.backend.database import open_database, sqlite_url
from pals.backend.service import HINT_LIFE_S, BackendService
from pals.errors import (
    BackendFull,
    InvalidConfig,
    InvalidRecord,
    InviteRefused,
    StorageFailed,
    UnknownSwarm,
)
from pals.swarm.hints import sign_hint
from pals.swarm.invite import Invite
from pals.swarm.records import decode_entry, digest
from pals.swarm.roster import verify_chain
from pals.types import SwarmId
from tests.unit.swarm.chains import NOW, Chain, identity

P, Q = identity(3), identity(4)
ADDRESS = "/ip4/10.0.0.5/tcp/4001"


class Clock:
    """A wall clock that the test moves."""

    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "backend.db"


@pytest.fixture
def service(path: Path, clock: Clock) -> Iterator[BackendService]:
    service = BackendService(sqlite_url(path), clock=clock)
    yield service
    service.close()


@pytest.fixture
def chain(service: BackendService) -> Chain:
    chain = Chain()
    service.create_swarm(chain.genesis)
    return chain


def invited(
    service: BackendService, chain: Chain, *, max_uses: int = 1, not_after: int = 0
) -> Invite:
    invite = chain.invite()
    certificate = chain.certificate(invite, max_uses=max_uses, not_after=not_after)
    service.append_record(chain.swarm_id, certificate)
    return invite


def uses(path: Path) -> list[int]:
    with closing(sqlite3.connect(path)) as connection:
        return [row[0] for row in connection.execute("SELECT used FROM invites")]


def members(service: BackendService, chain: Chain) -> frozenset[str]:
    return verify_chain(chain.swarm_id, service.entries(chain.swarm_id).entries).members


def test_redeemed_invite_admits_the_peer(service: BackendService, chain: Chain) -> None:
    invite = invited(service, chain)
    join = chain.join(invite.signing_key, P)
    entry = service.redeem(chain.swarm_id, invite.auth, join)
    assert decode_entry(entry).record == join
    assert members(service, chain) == {chain.founder.peer_id, P.peer_id}


def test_repeated_calls_change_nothing(
    service: BackendService, chain: Chain, path: Path, clock: Clock
) -> None:
    invite = chain.invite()
    certificate, join = chain.certificate(invite), chain.join(invite.signing_key, P)
    first = service.append_record(chain.swarm_id, certificate)
    admitted = service.redeem(chain.swarm_id, invite.auth, join)
    clock.now += 5
    etag = service.etag(chain.swarm_id)
    assert service.append_record(chain.swarm_id, certificate) == first
    assert service.redeem(chain.swarm_id, invite.auth, join) == admitted
    assert decode_entry(service.create_swarm(chain.genesis)).received_at == NOW
    assert service.etag(chain.swarm_id) == etag
    assert uses(path) == [1]


def test_etag_changes_with_the_chain(service: BackendService, chain: Chain) -> None:
    before = service.entries(chain.swarm_id)
    assert before.etag == service.etag(chain.swarm_id)
    invited(service, chain)
    assert service.etag(chain.swarm_id) != before.etag


def test_every_refusal_of_an_invite_is_the_same(
    service: BackendService, chain: Chain, clock: Clock
) -> None:
    spent, expiring, closing = (
        invited(service, chain),
        invited(service, chain, not_after=NOW + 10),
        invited(service, chain, max_uses=5),
    )
    service.redeem(chain.swarm_id, spent.auth, chain.join(spent.signing_key, identity(7)))
    join = chain.join(closing.signing_key, P)
    service.redeem(chain.swarm_id, closing.auth, join)
    service.append_record(chain.swarm_id, chain.remove(P, joined=digest(join)))
    clock.now += 11
    unknown, elsewhere = chain.invite(), Chain(operator=identity(8))
    attempts = [
        (chain.swarm_id, spent.auth, chain.join(spent.signing_key, Q)),
        (chain.swarm_id, expiring.auth, chain.join(expiring.signing_key, Q)),
        (chain.swarm_id, closing.auth, chain.join(closing.signing_key, Q)),
        (chain.swarm_id, closing.auth, join),
        (chain.swarm_id, unknown.auth, chain.join(unknown.signing_key, Q)),
        (chain.swarm_id, unknown.auth, chain.join(spent.signing_key, Q)),
        (elsewhere.swarm_id, spent.auth, elsewhere.join(spent.signing_key, Q)),
    ]
    texts: set[tuple[str, str]] = set()
    for swarm_id, auth, record in attempts:
        with pytest.raises(InviteRefused) as caught:
            service.redeem(swarm_id, auth, record)
        texts.add((str(caught.value), caught.value.hint))
    assert len(texts) == 1
    assert Q.peer_id not in members(service, chain)


def test_failed_redemption_uses_nothing(service: BackendService, chain: Chain, path: Path) -> None:
    first, second = invited(service, chain), invited(service, chain)
    service.redeem(chain.swarm_id, first.auth, chain.join(first.signing_key, P))
    with pytest.raises(InvalidRecord, match="member already"):
        service.redeem(chain.swarm_id, second.auth, chain.join(second.signing_key, P))
    assert sorted(uses(path)) == [0, 1]


def test_fifty_concurrent_redeems_admit_exactly_max_uses(
    service: BackendService, chain: Chain, path: Path
) -> None:
    invite = invited(service, chain, max_uses=3)
    joins = [chain.join(invite.signing_key, identity(100 + i)) for i in range(50)]

    def attempt(join: bytes) -> bool:
        try:
            service.redeem(chain.swarm_id, invite.auth, join)
        except InviteRefused:
            return False
        return True

    with ThreadPoolExecutor(50) as pool:
        outcomes = list(pool.map(attempt, joins))
    assert outcomes.count(True) == 3
    assert len(members(service, chain)) == 1 + 3
    assert uses(path) == [3]


def test_two_services_over_one_database_agree(
    service: BackendService, chain: Chain, path: Path, clock: Clock
) -> None:
    other = BackendService(sqlite_url(path), clock=clock)
    invite = invited(other, chain, max_uses=2)
    service.redeem(chain.swarm_id, invite.auth, chain.join(invite.signing_key, P))
    other.redeem(chain.swarm_id, invite.auth, chain.join(invite.signing_key, Q))
    assert service.entries(chain.swarm_id) == other.entries(chain.swarm_id)
    assert len(members(service, chain)) == 3
    other.close()


def test_records_outlive_a_restart(service: BackendService, chain: Chain, path: Path) -> None:
    invited(service, chain)
    before = service.entries(chain.swarm_id)
    service.close()
    again = BackendService(sqlite_url(path))
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
            service.append_record(chain.swarm_id, record)
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


def test_unknown_swarm_is_named(service: BackendService, chain: Chain) -> None:
    unknown = SwarmId(b"u" * 32)
    certificate = chain.certificate(chain.invite())
    for call in (
        lambda: service.entries(unknown),
        lambda: service.etag(unknown),
        lambda: service.hints(unknown),
        lambda: service.append_record(unknown, certificate),
    ):
        with pytest.raises(UnknownSwarm) as caught:
            call()
        assert caught.value.fields["swarm"] == unknown.hex()


def test_swarms_are_bounded(path: Path) -> None:
    service = BackendService(sqlite_url(path), max_swarms=1)
    service.create_swarm(Chain().genesis)
    with pytest.raises(BackendFull):
        service.create_swarm(Chain(operator=identity(8)).genesis)
    service.close()


def test_newest_hint_of_each_live_member_is_kept(
    service: BackendService, chain: Chain, clock: Clock
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
    clock.now += HINT_LIFE_S + 1
    assert service.hints(chain.swarm_id) == ()
    clock.now -= HINT_LIFE_S
    service.append_record(chain.swarm_id, chain.remove(P, joined=digest(join)))
    assert service.hints(chain.swarm_id) == ()


def test_hint_of_a_stranger_is_refused(service: BackendService, chain: Chain) -> None:
    hint = sign_hint(Q, swarm_id=chain.swarm_id, addresses=(ADDRESS,), issued_at=NOW)
    with pytest.raises(InvalidRecord, match="no live member"):
        service.put_hint(chain.swarm_id, hint)


def test_files_hold_no_token_and_no_secret(
    service: BackendService, chain: Chain, path: Path
) -> None:
    invite = invited(service, chain)
    service.redeem(chain.swarm_id, invite.auth, chain.join(invite.signing_key, P))
    stored = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert invite.redeem_hash in stored
    redeem_half = invite.to_text().removeprefix("pp_inv_").split(".")[0]
    canaries = (
        invite.auth,
        invite.signing_key.reveal_seed(),
        invite.secret.reveal(),
        invite.secret.to_text().encode(),
        redeem_half.encode(),
        P.reveal_seed(),
        chain.operator.reveal_seed(),
    )
    assert not [canary for canary in canaries if canary in stored]


def test_database_is_private_durable_and_in_wal_mode(service: BackendService, path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    with service._engine.connect() as connection:
        assert connection.scalar(sa.text("PRAGMA journal_mode")) == "wal"
        assert connection.scalar(sa.text("PRAGMA synchronous")) == 2
        assert connection.scalar(sa.text("PRAGMA foreign_keys")) == 1


def test_migrations_make_the_tables_that_the_code_uses(path: Path) -> None:
    engine = open_database(sqlite_url(path))
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
    engine.dispose()


@pytest.mark.parametrize(
    "url", ["nonsense", "sqlite:////proc/nowhere/backend.db", "other://host/db"]
)
def test_unusable_database_is_named_at_the_start(url: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        BackendService(url)
    assert caught.value.fields["source"]


def test_password_of_a_database_url_is_not_shown() -> None:
    with pytest.raises(InvalidConfig) as caught:
        BackendService("nothing://user:canary@host/db")
    assert "canary" not in f"{caught.value} {caught.value.hint}"


def test_file_that_is_no_database_is_refused_and_kept(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(InvalidConfig):
        BackendService(sqlite_url(path))
    assert path.read_bytes() == b"not a database" * 100


def test_lost_database_gives_a_typed_error(
    service: BackendService, chain: Chain, path: Path
) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE hints")
    with pytest.raises(StorageFailed) as caught:
        service.hints(chain.swarm_id)
    assert "hints" in str(caught.value.fields["problem"])
