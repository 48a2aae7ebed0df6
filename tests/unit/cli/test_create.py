"""`pals create` and `pals join` go on as `pals shard`, with what was typed for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from pals.cli import create as command
from pals.cli.app import build_app, run
from pals.config import Profile, SwarmEntry, SwarmSecret
from tests.checkpoints import make_llama_checkpoint

SECRET = SwarmSecret(bytes(range(32))).to_text()
SWARM_ID = "ab" * 32
INVITE = "pp_inv_canary"


class Replaced(Exception):
    """What the process was replaced with."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str]) -> None:
        super().__init__()
        self.arguments = list(arguments[3:])
        self.environment = environment


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(_: str, arguments: Sequence[str], environment: dict[str, str]) -> None:
        raise Replaced(arguments, environment)

    monkeypatch.setattr(os, "execve", replace)
    monkeypatch.setattr(command, "configure_logging", lambda *, verbose: None)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(make_llama_checkpoint(tmp_path / "tiny", num_layers=2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "profile"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Have swarms made and joined without a backend; return what was asked for."""
    asked: list[dict[str, object]] = []

    async def make(profile: Profile, **values: object) -> SwarmEntry:
        asked.append(values)
        return keep(profile, str(values["name"]), str(values["model"]))

    async def redeem(profile: Profile, invite: str) -> SwarmEntry:
        asked.append({"invite": invite})
        return keep(profile, "home", "org/model")

    monkeypatch.setattr(command, "make_swarm", make)
    monkeypatch.setattr("pals.net.enrolment.redeem_invite", redeem)
    return asked


def keep(profile: Profile, name: str, model: str) -> SwarmEntry:
    entry = SwarmEntry(
        swarm_id=SWARM_ID,
        name=name,
        model=model,
        backend_url="http://127.0.0.1:1",
        epoch=0,
        swarm_secret=SECRET,
        peer_credential="credential",
    )
    profile.create_folder()
    profile.save_swarm(entry)
    return entry


def replaced(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Replaced:
    monkeypatch.setattr(sys, "argv", ["pals", *arguments])
    with pytest.raises(Replaced) as caught:
        build_app()(list(arguments))
    return caught.value


def test_create_makes_the_swarm_and_serves_with_the_options_of_the_shard(
    monkeypatch: pytest.MonkeyPatch,
    made: list[dict[str, object]],
    model: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    at = ("--config-dir", str(folder))
    own = ("--name", "home", "--backend=http://127.0.0.1:1")

    become = replaced(monkeypatch, "create", model, *own, "--layers", "0:2", *at, "--threads=1")

    assert made == [{"name": "home", "model": model, "backend": "http://127.0.0.1:1"}]
    shard = ["shard", "--swarm", SWARM_ID, model, "--layers", "0:2", *at, "--threads=1"]
    assert become.arguments == shard
    assert become.environment["PALS_SWARM_SECRET"] == SECRET
    assert capsys.readouterr().out == f"created home, swarm {SWARM_ID}\n"


def test_create_keeps_the_backend_in_the_profile_unless_another_is_named(
    monkeypatch: pytest.MonkeyPatch, made: list[dict[str, object]], model: str, folder: Path
) -> None:
    replaced(monkeypatch, "create", model, "--config-dir", str(folder))

    assert made[0]["backend"] == "p2p"


@pytest.mark.parametrize(
    "bad",
    [
        ["--layers", "2:1"],
        ["--layers", "0:2", "--memory", "1GiB"],
        ["--preset", "absent"],
        ["--dtype", "f64"],
        ["--port", "1"],
        ["--swarm", "home"],
    ],
)
def test_create_makes_nothing_when_the_shard_would_be_refused(
    made: list[dict[str, object]], model: str, folder: Path, bad: list[str]
) -> None:
    assert run(["create", model, *bad, "--config-dir", str(folder)]) == 2

    assert made == []
    assert not folder.exists()


def test_create_makes_nothing_for_a_model_that_is_nowhere(
    made: list[dict[str, object]], folder: Path
) -> None:
    assert run(["create", "./absent", "--config-dir", str(folder)]) == 4

    assert made == []


def test_create_a_second_time_says_how_to_serve_the_first(
    monkeypatch: pytest.MonkeyPatch,
    made: list[dict[str, object]],
    model: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    replaced(monkeypatch, "create", model, "--config-dir", str(folder))

    assert run(["create", model, "--config-dir", str(folder)]) == 2

    assert len(made) == 1
    assert f"hint: run `pals shard {model}`" in capsys.readouterr().err


def test_join_redeems_the_invite_and_serves_what_the_swarm_names(
    monkeypatch: pytest.MonkeyPatch, made: list[dict[str, object]], folder: Path
) -> None:
    monkeypatch.setenv("PALS_INVITE", INVITE)
    at = ("--config-dir", str(folder))

    become = replaced(monkeypatch, "join", "--layers", "0:2", *at)

    assert made == [{"invite": INVITE}]
    assert become.arguments == ["shard", "--swarm", SWARM_ID, "--layers", "0:2", *at]
    assert INVITE not in become.environment.values()


def test_join_takes_no_invite_from_the_command_line(
    made: list[dict[str, object]], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["join", INVITE, "--config-dir", str(folder)]) == 2

    assert made == []
    assert "canary" not in capsys.readouterr().err


def test_join_keeps_the_invite_when_the_shard_would_be_refused(
    monkeypatch: pytest.MonkeyPatch, made: list[dict[str, object]], folder: Path
) -> None:
    for bad in (["--layers", "2:1"], ["--layers", "0:2", "--memory", "1GiB"], ["--swarm", "home"]):
        monkeypatch.setenv("PALS_INVITE", INVITE)
        assert run(["join", *bad, "--config-dir", str(folder)]) == 2

    assert made == []


def test_nothing_is_made_or_redeemed_while_a_process_runs_with_the_profile(
    monkeypatch: pytest.MonkeyPatch,
    made: list[dict[str, object]],
    model: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PALS_INVITE", INVITE)
    profile = Profile(folder)
    profile.create_folder()

    with profile.lock():
        for command in (["create", model], ["join"]):
            assert run([*command, "--config-dir", str(folder)]) == 2

    assert made == []
    assert capsys.readouterr().err.count("is in use by process") == 2
