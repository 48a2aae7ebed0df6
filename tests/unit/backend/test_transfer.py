from __future__ import annotations

import itertools
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pals.backend import queries, transfer
from pals.backend.database import sqlite_url
from pals.backend.service import BackendService, SignedRequest
from pals.backend.transfer import Copied, back_up, move
from pals.errors import InvalidConfig, InvalidRecord, InviteRefused, StorageFailed, UnknownSwarm
from pals.swarm.hints import sign_hint
from pals.swarm.invite import Invite
from tests.unit.backend.requests import append, signed
from tests.unit.swarm.chains import NOW, Chain, identity

if TYPE_CHECKING:
    from tests.postgres import PostgresServer

P, Q, R, SIGNER = (identity(number) for number in (3, 4, 6, 5))


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """A database that holds a bit of everything."""

    chain: Chain
    invite: Invite
    request: SignedRequest


def serve(url: str) -> BackendService:
    return BackendService(url, signer=SIGNER, clock=lambda: NOW)


@pytest.fixture
def filled(database_url: str) -> Filled:
    service, chain = serve(database_url), Chain()
    service.create_swarm(chain.genesis)
    service.create_swarm(Chain(operator=identity(8)).genesis)
    append(service, chain, chain.appoint(SIGNER.public_key, "backend"))
    invite = chain.invite()
    certificate = chain.certificate(invite, max_uses=2)
    request = signed(chain, certificate)
    service.append_record(chain.swarm_id, certificate, request)
    service.redeem(chain.swarm_id, invite.auth, chain.join(invite.signing_key, P))
    hint = sign_hint(
        P, swarm_id=chain.swarm_id, addresses=("/ip4/10.0.0.5/tcp/4001",), issued_at=NOW
    )
    service.put_hint(chain.swarm_id, hint)
    service.close()
    return Filled(chain=chain, invite=invite, request=request)


@pytest.fixture(params=["sqlite", "postgresql"])
def target_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return sqlite_url(tmp_path / "target.db")
    postgres: PostgresServer = request.getfixturevalue("postgres")
    return postgres.new_url()


def check_same(original_url: str, copy_url: str, filled: Filled) -> None:
    """Compare what members see, and whether the copy goes on as the original would."""
    original, copy, chain = serve(original_url), serve(copy_url), filled.chain
    assert copy.entries(chain.swarm_id) == original.entries(chain.swarm_id)
    assert copy.hints(chain.swarm_id) == original.hints(chain.swarm_id) != ()
    with pytest.raises(InvalidRecord, match="made before"):
        copy.append_record(chain.swarm_id, filled.request.body, filled.request)
    invite = filled.invite
    copy.redeem(chain.swarm_id, invite.auth, chain.join(invite.signing_key, Q))
    with pytest.raises(InviteRefused):
        copy.redeem(chain.swarm_id, invite.auth, chain.join(invite.signing_key, R))
    original.close()
    copy.close()


def test_move_keeps_every_byte(database_url: str, target_url: str, filled: Filled) -> None:
    assert move(database_url, target_url) == Copied(swarms=2, entries=5)
    check_same(database_url, target_url, filled)


def test_backup_is_a_private_database_of_its_own(
    database_url: str, filled: Filled, tmp_path: Path
) -> None:
    file = tmp_path / "backups" / "copy.db"
    running = serve(database_url)
    for _ in range(2):
        assert back_up(database_url, file) == Copied(swarms=2, entries=5)
    running.close()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [entry.name for entry in file.parent.iterdir()] == ["copy.db"]
    check_same(database_url, sqlite_url(file), filled)


def test_backup_is_of_one_moment(
    database_url: str, filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, running = tmp_path / "copy.db", serve(database_url)
    before = running.entries(filled.chain.swarm_id)
    original, epochs = transfer._copy_table, itertools.count(1)

    def copy_while_others_write(*arguments: object) -> None:
        append(running, filled.chain, filled.chain.epoch(next(epochs)))
        original(*arguments)  # type: ignore[arg-type]

    # SQLite's snapshot begins with its first statement, which is this one.
    monkeypatch.setattr(transfer, "_copy_table", copy_while_others_write)
    back_up(database_url, file)
    restored = serve(sqlite_url(file))
    entries = restored.entries(filled.chain.swarm_id).entries or ()
    assert len(entries) == len(before.entries or ()) + 1
    restored.close()
    running.close()


def test_failed_backup_leaves_the_one_before(
    database_url: str, filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "copy.db"
    back_up(database_url, file)
    before = file.read_bytes()
    original = queries.all_entries
    read: list[object] = []

    def lose_one(connection: object) -> object:
        read.append(connection)
        rows = list(original(connection))  # type: ignore[arg-type]
        return iter(rows if len(read) == 1 else rows[:-1])

    monkeypatch.setattr(queries, "all_entries", lose_one)
    with pytest.raises(StorageFailed, match="not the original"):
        back_up(database_url, file)
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == ["copy.db"]
    assert file.read_bytes() == before


def test_database_that_is_in_use_is_no_target(
    database_url: str, target_url: str, filled: Filled
) -> None:
    other, chain = serve(target_url), Chain(operator=identity(9))
    other.create_swarm(chain.genesis)
    before = other.entries(chain.swarm_id)
    with pytest.raises(InvalidConfig, match="1 swarms already"):
        move(database_url, target_url)
    assert other.entries(chain.swarm_id) == before
    with pytest.raises(UnknownSwarm):
        other.entries(filled.chain.swarm_id)
    other.close()


def test_database_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    missing = tmp_path / "missing.db"
    with pytest.raises(InvalidConfig, match="no such file"):
        back_up(sqlite_url(missing), tmp_path / "copy.db")
    assert list(tmp_path.iterdir()) == []


def test_backup_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    source = sqlite_url(tmp_path / "backend.db")
    serve(source).close()
    (tmp_path / "folder").mkdir()
    for file in (Path("/proc/nowhere/copy.db"), tmp_path / "folder"):
        with pytest.raises(InvalidConfig) as caught:
            back_up(source, file)
        assert caught.value.fields["source"] == file
        assert "--backup" in caught.value.hint
