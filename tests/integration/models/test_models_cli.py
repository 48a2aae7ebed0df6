"""`pals models …` against a hub of the test's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import constants

from pals import config
from pals.cli.app import run
from tests import checkpoints
from tests.integration.models.conftest import NAME
from tests.integration.models.hub_server import TOKEN, Fault, HubServer, Repo
from tests.waiting import wait_until


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str


class Pals:
    """Runs `pals models …` in some way."""

    def __init__(self, command: Callable[[list[str]], Done]) -> None:
        self._command = command

    def __call__(self, *words: str) -> Done:
        return self._command(["models", *words])

    def json(self, *words: str, status: int = 0) -> dict[str, object]:
        done = self(*words, "--json")
        assert done.status == status, done.err
        return json.loads(done.out)


@pytest.fixture
def pals(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> Pals:
    """Run commands in this process, whose client the test's hub is."""

    def command(words: list[str]) -> Done:
        capsys.readouterr()
        status = run(words)
        out, err = capsys.readouterr()
        return Done(status, out, err)

    return Pals(command)


@pytest.fixture
def environment(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    """Return the variables that the hub's client reads when it is imported."""
    variables = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
    }
    return {k: v for k, v in os.environ.items() if k != "HF_HUB_CACHE"} | variables


@pytest.fixture
def pals_process(environment: dict[str, str]) -> Pals:
    """Run commands as processes."""

    def command(words: list[str]) -> Done:
        line = [sys.executable, "-m", "pals", *words]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=50)
        return Done(done.returncode, done.stdout, done.stderr)

    return Pals(command)


def test_a_pulled_slice_is_shown_listed_verified_and_removed(
    repo: Repo, pals_process: Pals, tmp_path: Path
):
    shown = pals_process.json("show", NAME)
    assert (shown["family"], shown["num_layers"], shown["layers"]) == ("llama", 4, [])
    assert shown["licence"] == "apache-2.0"
    assert len(shown["files"]) == 3

    pulled = pals_process.json("pull", NAME, "--layers", "1:3")
    assert pulled["layers"] == ["1:3"]
    assert str(pulled["path"]).startswith(str(tmp_path / "hf" / "hub" / "models--org--tiny"))

    (listed,) = pals_process.json("list")["models"]
    assert (listed["model"], listed["source"], listed["layers"]) == (NAME, "hub", ["1:3"])
    assert pals_process.json("verify", NAME) == {
        "schema": 1,
        "model": NAME,
        "whole": True,
        "damaged": [],
    }

    assert not pals_process.json("remove", NAME)["removed"]
    assert Path(pulled["path"]).is_dir()
    assert pals_process.json("remove", NAME, "--yes")["removed"]
    assert not list((tmp_path / "hf" / "hub").glob("models--*"))
    assert pals_process.json("list")["models"] == []


def test_the_hub_is_asked_for_the_model_and_for_nothing_else(
    hub: HubServer, repo: Repo, pals_process: Pals
):
    pals_process.json("pull", NAME, "--layers", "1:2")

    strange = {r.path for r in hub.requests if r.server == "hub" and NAME not in r.path}
    assert strange == set()


def test_a_whole_model_and_a_revision_are_pulled(repo: Repo, pals: Pals, tmp_path: Path):
    repo.folders["v2"] = checkpoints.make_llama_checkpoint(tmp_path / "v2", seed=5, files=3)
    assert pals.json("pull", NAME)["layers"] == ["0:4"]
    second = pals.json("pull", NAME, "--layers", "0:1", "--revision", "v2")
    assert (second["revision"], second["layers"]) == (repo.commit_of("v2"), ["0:1"])
    assert len(pals.json("list")["models"]) == 2


def test_without_a_terminal_progress_is_plain_lines(repo: Repo, pals: Pals):
    done = pals("pull", NAME, "--layers", "0:2")
    assert done.status == 0
    assert "0.3 MB to download" in done.err
    assert "0.3 MB of 0.3 MB" in done.err
    assert "\x1b" not in done.err
    assert done.out.startswith(f"{NAME}  0:2  ")


def test_damage_is_named_and_mended_by_another_pull(
    hub: HubServer, repo: Repo, pals: Pals, tmp_path: Path
):
    pals.json("pull", NAME, "--layers", "0:2")
    (part,) = tmp_path.rglob("layer-00001.safetensors")
    state = part.stat()
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    os.utime(part, ns=(state.st_atime_ns, state.st_mtime_ns))  # as a failing disk would

    damaged = pals.json("verify", NAME, status=4)["damaged"]
    assert len(damaged) == 1
    assert "layer-00001" in damaged[0]["file"]
    assert "model.layers.1." in damaged[0]["file"]

    pals.json("pull", NAME, "--layers", "0:2")
    assert pals.json("verify", NAME)["whole"]


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", "tokenizer.json"])
def test_damage_to_a_whole_file_is_named(repo: Repo, pals: Pals, tmp_path: Path, name: str):
    pals.json("pull", NAME)
    (path,) = tmp_path.glob(f"hub-cache/*/snapshots/*/{name}")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.resolve().write_bytes(data)
    done = pals("verify", NAME)
    assert done.status == 4
    assert name in done.out


def test_an_import_is_listed_verified_and_removed(repo: Repo, pals: Pals):
    folder = config.cache_dir() / "models" / "org--mine"
    checkpoints.make_llama_checkpoint(folder)
    (listed,) = pals.json("list")["models"]
    assert (listed["model"], listed["source"], listed["layers"]) == ("org/mine", "import", ["0:4"])
    assert pals.json("verify", "org/mine")["whole"]
    pals.json("remove", "org/mine", "--yes")
    assert not folder.exists()


@pytest.mark.parametrize("verb", ["verify", "remove"])
def test_a_model_that_is_not_here_is_named(pals: Pals, verb: str):
    done = pals(verb, NAME)
    assert done.status == 4
    assert "nothing of it is on this machine" in done.err


@pytest.mark.parametrize("verb", ["show", "pull", "verify", "remove"])
def test_a_name_that_leaves_the_cache_is_refused(pals: Pals, verb: str):
    done = pals(verb, "org/..%2f..%2fetc")
    assert done.status == 4
    assert "org/name" in done.err


def test_a_gated_model_is_explained_and_no_token_is_shown(
    repo: Repo, pals: Pals, monkeypatch: pytest.MonkeyPatch
):
    repo.gated = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = pals("pull", NAME)
    assert done.status == 4
    assert f"/{NAME}" in done.err
    assert "gated" in done.err
    assert TOKEN not in done.out + done.err


def test_offline_a_pulled_model_is_shown_without_asking(
    hub: HubServer, repo: Repo, pals: Pals, monkeypatch: pytest.MonkeyPatch
):
    pals.json("pull", NAME, "--layers", "0:1")
    hub.forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pals.json("show", NAME)["layers"] == ["0:1"]
    assert pals("pull", NAME).status == 4
    assert not hub.requests


def _largest(files: Iterable[Path]) -> int:
    return max((path.stat().st_size for path in files), default=0)


def test_a_killed_download_goes_on_where_it_ended(
    hub: HubServer,
    repo: Repo,
    environment: dict[str, str],
    pals_process: Pals,
    tmp_path: Path,
):
    repo.folders["main"] = checkpoints.make_llama_checkpoint(
        tmp_path / "wide", hidden_size=512, intermediate_size=1024, num_layers=3
    )
    file = repo.folders["main"] / "model.safetensors"
    fault = hub.add(Fault(skip=2, hang_after=4 << 20))
    command = [sys.executable, "-m", "pals", "models", "pull", NAME, "--layers", "1:2"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as child:
        assert fault.reached.wait(40)
        # What was sent may still be on its way: kill when some of it is kept.
        wait_until(lambda: _largest(tmp_path.rglob("*.partial")) > 1 << 20)
        child.kill()
    fault.release.set()
    assert pals_process.json("list")["models"][0]["layers"] == []

    (begun,) = hub.ranges(file)[2:]
    assert pals_process.json("pull", NAME, "--layers", "1:2")["layers"] == ["1:2"]
    resumed = hub.ranges(file)[3:]
    assert min(start for start, _ in resumed) > begun[0]
    assert pals_process.json("verify", NAME)["whole"]
