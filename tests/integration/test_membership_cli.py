"""The membership commands as a user types them, in process, against a real backend."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pals import config
from pals.backend.database import sqlite_url
from pals.backend.service import BackendService
from pals.cli.app import run
from tests.integration.backends import running_backend

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    service = BackendService(sqlite_url(tmp_path / "backend" / "backend.db"))
    with running_backend(service) as url:
        yield url
    service.close()


@pytest.fixture
def swarm(url: str, capsys: Capture) -> None:
    """Make the default profile the operator of a swarm."""
    assert run(["init"]) == 0
    assert run(["swarm", "create", "--model", "org/model", "--backend", url]) == 0
    capsys.readouterr()


def invited(capsys: Capture, *options: str) -> str:
    assert run(["invite", "create", "--json", *options]) == 0
    return str(json.loads(capsys.readouterr().out)["invite"])


def document(capsys: Capture) -> dict[str, object]:
    return json.loads(capsys.readouterr().out)


def test_init_keeps_an_existing_identity(capsys: Capture) -> None:
    assert run(["init"]) == 0
    first = capsys.readouterr().out
    assert run(["init"]) == 0
    assert capsys.readouterr().out == first
    assert "12D3KooW" in first


@pytest.mark.usefixtures("swarm")
def test_printed_command_carries_the_invite_in_the_environment(capsys: Capture) -> None:
    assert run(["invite", "create"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("PALS_INVITE=pp_inv_")
    assert captured.out.endswith(" pals login\n")
    assert "only this machine reaches" in captured.err


@pytest.mark.usefixtures("swarm")
def test_login_from_the_environment_or_standard_input(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invite = invited(capsys, "--max-uses", "2")
    monkeypatch.setenv(config.INVITE_VARIABLE, invite)
    assert run(["login", "--config-dir", str(tmp_path / "a")]) == 0
    assert config.INVITE_VARIABLE not in os.environ
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{invite}\n"))
    assert run(["login", "--config-dir", str(tmp_path / "b")]) == 0
    capsys.readouterr()
    assert run(["swarm", "show", "--json", "--config-dir", str(tmp_path / "b")]) == 0
    shown = document(capsys)
    assert (shown["members"], shown["role"], shown["list"]) == (3, "member", "fresh")


@pytest.mark.usefixtures("swarm")
def test_invite_on_the_command_line_is_refused_and_not_repeated(
    capsys: Capture, tmp_path: Path
) -> None:
    invite = invited(capsys)
    assert run(["login", invite, "--config-dir", str(tmp_path / "a")]) == 2
    captured = capsys.readouterr()
    assert "PALS_INVITE" in captured.err
    assert invite not in captured.out + captured.err
    assert not (tmp_path / "a").exists()


def test_login_without_an_invite_says_where_it_is_looked_for(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert run(["login"]) == 2
    assert "PALS_INVITE" in capsys.readouterr().err


@pytest.mark.usefixtures("swarm")
def test_kicked_peer_leaves_the_table(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(config.INVITE_VARIABLE, invited(capsys))
    assert run(["login", "--config-dir", str(tmp_path / "a")]) == 0
    capsys.readouterr()
    assert run(["peers", "list", "--json"]) == 0
    peers = document(capsys)["peers"]
    assert isinstance(peers, list)
    other = next(p["peer"] for p in peers if not p["self"])
    assert run(["peers", "kick", other]) == 0
    capsys.readouterr()
    assert run(["peers", "list"]) == 0
    assert other not in capsys.readouterr().out
    assert run(["peers", "kick", other]) == 2
    assert "no live member" in capsys.readouterr().err


@pytest.mark.usefixtures("swarm")
def test_no_command_shows_the_secret(capsys: Capture) -> None:
    secret = config.Profile(config.config_dir()).load_swarm().swarm_secret
    for command in (["swarm", "show"], ["peers", "list"], ["init"], ["swarm", "create"]):
        run([*command, *(["--model", "org/model"] if command[-1] == "create" else [])])
    captured = capsys.readouterr()
    assert secret not in captured.out + captured.err


def test_taken_port_is_named_before_the_backend_starts(tmp_path: Path, capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run(["backend", "--port", port, "--data", str(tmp_path / "backend.db")]) == 2
    assert port in capsys.readouterr().err
    assert not (tmp_path / "backend.db").exists()


def test_backend_prints_its_address_and_stops_on_a_signal(tmp_path: Path) -> None:
    data = tmp_path / "backend.db"
    command = [sys.executable, "-m", "pals", "backend", "--port", "0", "--data", str(data)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    assert data.exists()
