"""`pals warmup` as a process: broken off, gone on with, and carried to another machine."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from pals.engine.lowering import FOLDER
from tests.checkpoints import make_llama_checkpoint
from tests.integration.processes import END_S, Pals
from tests.waiting import wait_until

SMALL = ("--layers", "0:1", "--rows", "2", "--context", "64", "--kv-memory", "1MiB")


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(make_llama_checkpoint(tmp_path / "tiny", num_layers=2))


def machine(folder: Path) -> Pals:
    """Return a machine that has compiled nothing."""
    return Pals({"HF_HUB_OFFLINE": "1", "PALS_CACHE_DIR": str(folder)})


def entries(folder: Path) -> set[str]:
    """Return the names of what is in a cache of programs, beside the steps that were traced."""
    names = {file.name for pattern in ("*", ".*") for file in folder.glob(f"xla/{pattern}")}
    return names - {FOLDER}


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_warmup_is_broken_off_gone_on_with_and_carried(model: str, tmp_path: Path):
    here, there, file = tmp_path / "here", tmp_path / "there", tmp_path / "programs.pals"

    with machine(here).start("warmup", model, *SMALL) as running:
        wait_until(lambda: list(here.glob("xla/.stage-*/jit_layer*-cache")))
        running.signal(signal.SIGINT)
        ended = running.wait(within_s=4 * END_S)

    assert (ended.status, ended.out) == (130, "")
    assert "Traceback" not in ended.err
    whole = entries(here)
    assert whole
    assert all(name.endswith("-cache") for name in whole)

    done = machine(here).run("warmup", model, *SMALL, "--export", file, "--json")

    document = json.loads(done.out)
    assert "Error reading" not in done.err
    assert 0 < document["from_cache"] <= len(whole)
    assert document["compiled"] > 0

    refused = machine(there).run("warmup", model, *SMALL, "--dtype", "f32", "--import", file)
    assert refused.status == 2
    assert "dtype: `bf16` there, `f32` here" in refused.err
    assert entries(there) == set()

    done = machine(there).run("warmup", model, *SMALL, "--import", file, "--json")

    assert json.loads(done.out)["added"] == document["compiled"] + document["from_cache"]
    assert len(entries(there)) == json.loads(done.out)["added"]
