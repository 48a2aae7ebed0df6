"""The membership commands as a user types them, in process, against a real backend."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from pals import config
from pals.backend.database import sqlite_url
from pals.backend.service import BackendService
from pals.cli.app import run
from pals.swarm.identity import load_or_create_identity
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
    assert run(["peers", "kick", other[-8:], "--json"]) == 0
    assert document(capsys) == {
        "schema": 1,
        "peer": other,
        "listed": True,
        "rotated": True,
        "epoch": 1,
    }
    assert run(["peers", "list"]) == 0
    assert other not in capsys.readouterr().out
    assert run(["peers", "kick", other]) == 2
    assert "no live member" in capsys.readouterr().err


@pytest.mark.usefixtures("swarm")
def test_kick_without_the_backend_says_so_and_how_to_end_it(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(config.INVITE_VARIABLE, invited(capsys))
    assert run(["login", "--config-dir", str(tmp_path / "a")]) == 0
    assert run(["peers", "list", "--json", "--offline"]) == 0
    profile = config.Profile(config.config_dir())
    profile.save_swarm(replace(profile.load_swarm(), backend_url="http://127.0.0.1:1"))
    capsys.readouterr()

    peer = load_or_create_identity(config.Profile(tmp_path / "a")).peer_id
    assert run(["peers", "kick", peer]) == 3

    captured = capsys.readouterr()
    assert captured.out == f"removed {peer}\n"
    assert "the backend did not take the removal" in captured.err
    assert f"`pals peers kick {peer[-8:]}` again" in captured.err


@pytest.mark.usefixtures("swarm")
def test_members_are_listed_with_their_invite_and_when_they_were_seen(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(config.INVITE_VARIABLE, invited(capsys, "--note", "for Ben"))
    assert run(["login", "--config-dir", str(tmp_path / "a")]) == 0
    profile = config.Profile(config.config_dir())
    peer = load_or_create_identity(config.Profile(tmp_path / "a")).peer_id
    seen = config.KnownPeer(peer=peer, addresses=(), reached_at=int(time.time()) - 7200)
    profile.save_known_peers(profile.load_swarm().swarm_id, [seen])
    capsys.readouterr()

    assert run(["peers", "list", "--offline"]) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["PEER", "JOINED", "VIA", "ROLE", "SEEN", "LAYERS"]
    assert first.split()[2:] == ["genesis", "operator", "this", "machine"]
    assert peer in second
    assert "for Ben (" in second
    assert second.endswith("member    2 h ago")


# --- invites -------------------------------------------------------------------------


@pytest.mark.usefixtures("swarm")
def test_invite_is_listed_sent_again_and_revoked(capsys: Capture) -> None:
    text = invited(capsys, "--note", "for Ben", "--max-uses", "2", "--expires-hours", "24")
    assert run(["invite", "list"]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["INVITE", "STATUS", "USED", "EXPIRES", "NOTE"]
    assert line.split()[1:3] == ["open", "0/2"]
    key = line.split()[0]

    assert run(["invite", "resend", key, "--json"]) == 0
    assert document(capsys)["invite"] == text
    assert run(["invite", "revoke", key]) == 0
    assert capsys.readouterr().out == f"revoked {key}\n"

    assert run(["invite", "list", "--json", "--status", "revoked"]) == 0
    (listed,) = document(capsys)["invites"]  # type: ignore[misc]
    assert (listed["id"], listed["status"], listed["kept"]) == (key, "revoked", False)
    assert run(["invite", "list", "--json", "--status", "open"]) == 0
    assert document(capsys)["invites"] == []
    assert run(["invite", "resend", key]) == 2
    assert "is revoked" in capsys.readouterr().err
    assert run(["invite", "revoke", "ffff0000"]) == 2
    assert "pals invite list" in capsys.readouterr().err


@pytest.mark.usefixtures("swarm")
def test_qr_code_is_for_people_alone(capsys: Capture) -> None:
    assert run(["invite", "create", "--qr"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("PALS_INVITE=pp_inv_")
    assert len(lines) > 20
    assert set("".join(lines[1:])) <= set(" ▀▄█")
    assert run(["invite", "create", "--qr", "--json"]) == 0
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.usefixtures("swarm")
@pytest.mark.parametrize("uses", ["0", "513", "-1", "many"])
def test_uses_out_of_range_are_a_usage_error(capsys: Capture, uses: str) -> None:
    assert run(["invite", "create", "--max-uses", uses]) == 2
    assert "PALS_INVITE" not in capsys.readouterr().out


# --- several swarms, the operator's key, status --------------------------------------


@pytest.mark.usefixtures("swarm")
def test_one_of_several_swarms_is_named(capsys: Capture, url: str) -> None:
    office = ["swarm", "create", "--name", "office", "--model", "org/model", "--backend", url]
    assert run([*office, "--json"]) == 0
    swarm_id = str(document(capsys)["swarm_id"])
    assert run(["swarm", "list", "--json"]) == 0
    listed = document(capsys)["swarms"]
    assert isinstance(listed, list)
    assert {swarm["name"] for swarm in listed} == {"my-swarm", "office"}

    for command in (["invite", "create"], ["peers", "list"], ["swarm", "show"]):
        assert run(command) == 2
        error = capsys.readouterr().err
        assert f"office ({swarm_id[:8]})" in error
        assert "--swarm" in error
        for name in ("office", swarm_id[:6]):
            assert run([*command, "--swarm", name, "--json"]) == 0
            capsys.readouterr()
    assert run(["swarm", "show", "--swarm", "offise"]) == 2
    assert "offise" in capsys.readouterr().err
    assert run(["shard", "--layers", "0:1", "--swarm", "offise"]) == 2


@pytest.mark.usefixtures("swarm")
def test_status_shows_every_swarm_and_what_to_do(capsys: Capture) -> None:
    assert run(["status"]) == 0
    captured = capsys.readouterr()
    header, line = captured.out.splitlines()
    assert header.split() == ["SWARM", "ROLE", "MEMBERS", "EPOCH", "LIST", "AGE"]
    assert line.split()[:5] == ["my-swarm", "operator", "1", "0", "fresh"]
    assert "my-swarm: let another machine in with `pals invite create`" in captured.err

    assert run(["swarm", "rotate"]) == 0
    assert capsys.readouterr().out == "epoch  1\n"
    assert run(["status", "--json"]) == 0
    (swarm,) = document(capsys)["swarms"]  # type: ignore[misc]
    assert (swarm["epoch"], swarm["role"], swarm["alarms"]) == (1, "operator", [])


def test_status_of_a_profile_without_a_swarm_says_how_to_get_one(capsys: Capture) -> None:
    assert run(["init"]) == 0
    assert run(["status"]) == 2
    assert "pals login" in capsys.readouterr().err


@pytest.mark.usefixtures("swarm")
def test_operator_key_is_written_once_privately_and_read_on_another_machine(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(config.INVITE_VARIABLE, invited(capsys))
    assert run(["login", "--config-dir", str(tmp_path / "a")]) == 0
    file = tmp_path / "operator.pem"
    capsys.readouterr()

    assert run(["swarm", "export-key", str(file)]) == 0

    assert file.stat().st_mode & 0o777 == 0o600
    pem = file.read_text()
    captured = capsys.readouterr()
    assert pem not in captured.out + captured.err
    assert run(["swarm", "export-key", str(file)]) == 2
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert run(["swarm", "export-key", str(tmp_path / "link")]) == 2
    assert file.read_text() == pem
    assert not (tmp_path / "elsewhere").exists()
    capsys.readouterr()
    assert run(["swarm", "export-key", "-"]) == 0
    assert capsys.readouterr().out == pem

    file.chmod(0o644)
    assert run(["swarm", "import-key", str(file), "--config-dir", str(tmp_path / "a")]) == 2
    file.chmod(0o600)
    assert run(["swarm", "import-key", str(file), "--config-dir", str(tmp_path / "a")]) == 0
    assert run(["invite", "create", "--config-dir", str(tmp_path / "a")]) == 0


@pytest.mark.usefixtures("swarm")
def test_admin_is_appointed_and_the_operator_may_leave(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(config.INVITE_VARIABLE, invited(capsys))
    assert run(["login", "--config-dir", str(tmp_path / "a")]) == 0
    peer = load_or_create_identity(config.Profile(tmp_path / "a")).peer_id
    assert run(["swarm", "leave"]) == 2
    assert "pals swarm appoint" in capsys.readouterr().err

    assert run(["swarm", "appoint", peer[-8:]]) == 0
    assert capsys.readouterr().out == f"{peer} is an admin\n"
    assert run(["peers", "list", "--offline", "--config-dir", str(tmp_path / "a")]) == 0
    assert "admin" in capsys.readouterr().out
    assert run(["swarm", "leave"]) == 0
    assert run(["swarm", "list"]) == 0
    assert "my-swarm" not in capsys.readouterr().out.splitlines()[-1]


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
