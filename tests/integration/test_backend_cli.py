"""`pals backend`: where its database is, copies of it, and what it never shows."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from pals import config
from pals.backend.database import sqlite_url
from pals.backend.service import BackendService
from pals.cli.app import run
from tests.postgres import PostgresServer
from tests.unit.swarm.chains import Chain

Capture = pytest.CaptureFixture[str]
PASSWORD = "canary-password"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a database with one swarm."""
    path = tmp_path / "backend.db"
    service = BackendService(sqlite_url(path))
    service.create_swarm(Chain().genesis)
    service.close()
    return path


def entries(url: str) -> tuple[bytes, ...] | None:
    service = BackendService(url)
    try:
        return service.entries(Chain().swarm_id).entries
    finally:
        service.close()


def test_backup_is_written_and_told(data: Path, tmp_path: Path, capsys: Capture) -> None:
    copy = tmp_path / "copies" / "backend.db"
    assert run(["backend", "--data", str(data), "--backup", str(copy)]) == 0
    assert capsys.readouterr().out == f"copied 1 swarms with 1 records to {copy}\n"
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert run(["backend", "--data", str(data), "--backup", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"schema": 1, "swarms": 1, "records": 1}
    assert entries(sqlite_url(copy)) == entries(sqlite_url(data))


def test_database_moves_to_postgres_and_back(
    data: Path, tmp_path: Path, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, file = postgres.new_url(), tmp_path / "url"
    config.write_private(file, f"{url}\n".encode())
    assert run(["backend", "--data", str(data), "--move-to", str(file)]) == 0
    assert entries(url) == entries(sqlite_url(data))
    back = tmp_path / "back.db"
    monkeypatch.setenv(config.DATABASE_URL_VARIABLE, url)
    assert run(["backend", "--move-to", sqlite_url(back)]) == 0
    assert back.read_bytes()
    assert entries(sqlite_url(back)) == entries(url)
    assert run(["backend", "--database-url", str(file), "--move-to", sqlite_url(back)]) == 2


@pytest.mark.parametrize("option", ["--database-url", "--move-to"])
@pytest.mark.parametrize(
    "url", [f"postgresql://anna:{PASSWORD}@db/pals", f"postgresql://db/pals?password={PASSWORD}"]
)
def test_password_on_the_command_line_is_refused(
    option: str, url: str, data: Path, capsys: Capture
) -> None:
    source = [] if option == "--database-url" else ["--data", str(data)]
    assert run(["backend", *source, option, url]) == 2
    captured = capsys.readouterr()
    assert PASSWORD not in captured.out + captured.err
    assert f"`{option}`" in captured.err
    assert "environment" in captured.err


def test_password_of_a_database_that_does_not_answer_is_not_shown(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"postgresql://anna:{PASSWORD}@127.0.0.1:1/pals"
    monkeypatch.setenv(config.DATABASE_URL_VARIABLE, url)
    assert run(["backend", "--port", "0"]) == 2
    captured = capsys.readouterr()
    assert "anna:***@127.0.0.1:1/pals" in captured.err
    assert PASSWORD not in captured.out + captured.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data", "a.db", "--database-url", "postgresql://db/pals"], "`--database-url`"),
        (["--backup", "a.db", "--move-to", "postgresql://db/pals"], "`--move-to`"),
        (["--database-url", "no-such-file"], "no-such-file"),
        (["--trusted-proxy", "proxy.example", "--port", "0"], "proxy.example"),
        (["--log-format", "xml"], "xml"),
        (["--data", "no-such.db", "--backup", "b.db"], "no-such.db"),
    ],
)
def test_options_that_cannot_be_meant_are_named(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["backend", *arguments]) == 2
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_exposed_file_with_a_url_is_refused(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "url"
    file.write_text(f"postgresql://anna:{PASSWORD}@db/pals")
    file.chmod(0o644)
    assert run(["backend", "--database-url", str(file)]) == 2
    captured = capsys.readouterr()
    assert PASSWORD not in captured.out + captured.err
