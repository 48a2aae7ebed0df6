"""`pals demo` as a process: what it prints, and that nothing of it stays."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.demo_model import import_demo_model
from tests.integration.processes import (
    END_S,
    Finished,
    Pals,
    Running,
    assert_refused,
)
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
    pytest.mark.timeout(300),
]

LAYERS = ["0:10", "10:20", "20:30"]


@pytest.fixture(scope="module")
def cache(shared_cache: Path) -> Path:
    """Return a cache with the model; the first demo compiles into it."""
    import_demo_model(shared_cache)
    return shared_cache


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder in which a demo makes its temporary one."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    return folder


@pytest.fixture
def pals(folder: Path, cache: Path) -> Pals:
    return Pals({"HF_HUB_OFFLINE": "1", "TMPDIR": str(folder), "PALS_CACHE_DIR": str(cache)})


def assert_interrupted(done: Finished) -> None:
    assert done.status == 130, done.err
    assert "Traceback" not in done.err
    assert "error" not in done.err


def test_three_shards_answer_and_leave_nothing(pals: Pals, folder: Path) -> None:
    done = pals.run("demo", "--json")

    document = json.loads(done.out)
    assert done.status == 0
    assert "Paris" in document["text"]
    assert document["completion_tokens"] > 0
    assert document["tokens_per_s"] > 0
    assert document["time_to_first_token_s"] > 0
    assert [shard["layers"] for shard in document["shards"]] == LAYERS
    assert all(shard["step_ms"] > 0 and shard["hop_ms"] > 0 for shard in document["shards"])
    assert len({shard["peer"] for shard in document["shards"]}) == len(LAYERS)
    assert pals.processes() == {}
    assert list(folder.iterdir()) == []


def has_started(demo: Running, folder: Path, cache: Path) -> None:
    wait_until(lambda: list(folder.glob("pals-demo-*")))


def starts_the_shards(demo: Running, folder: Path, cache: Path) -> None:
    demo.wait_for_note("swarm ")


def compiles(demo: Running, folder: Path, cache: Path) -> None:
    """Return once the first of many programs is compiled."""
    demo.wait_for_note("swarm ")
    wait_until(lambda: list((cache / "xla").glob("*")))


def keeps_running(demo: Running, folder: Path, cache: Path) -> None:
    for text in ("Paris", "STEP MS", "20:30", "tokens/s", "endpoint http://127.0.0.1:", "curl "):
        demo.wait_for_line(text)
    demo.wait_for_note("running until Ctrl-C")


def to_the_leader(demo: Running) -> None:
    demo.signal(signal.SIGINT)


def to_the_foreground(demo: Running) -> None:
    demo.signal_group(signal.SIGINT)


def several_times(demo: Running) -> None:
    for _ in range(3):
        demo.signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("moment", "send"),
    [
        (has_started, to_the_leader),
        (has_started, to_the_foreground),
        (starts_the_shards, to_the_leader),
        (starts_the_shards, several_times),
        (compiles, to_the_leader),
        (compiles, to_the_foreground),
        (keeps_running, to_the_leader),
        (keeps_running, to_the_foreground),
    ],
)
def test_ctrl_c_ends_everything_within_seconds(
    pals: Pals,
    folder: Path,
    cache: Path,
    tmp_path: Path,
    moment: Callable[[Running, Path, Path], None],
    send: Callable[[Running], None],
) -> None:
    if moment is compiles:  # into an empty cache, so that it takes long
        cold = tmp_path / "cold"
        cold.mkdir()
        (cold / "models").symlink_to(cache / "models")
        cache = cold
    models = sorted((cache / "models").iterdir())
    with pals.start("demo", "--keep", PALS_CACHE_DIR=str(cache)) as demo:
        moment(demo, folder, cache)
        started = pals.processes()
        send(demo)
        done = demo.wait(within_s=END_S)

        assert demo.pid in started
        assert_interrupted(done)
        assert pals.processes() == {}
        assert list(folder.iterdir()) == []
    assert sorted((cache / "models").iterdir()) == models


def test_ctrl_c_while_the_model_is_imported_leaves_no_half_of_it(
    pals: Pals, folder: Path, tmp_path: Path
) -> None:
    models = tmp_path / "cold" / "models"
    with pals.start("demo", PALS_CACHE_DIR=str(models.parent)) as demo:
        wait_until(lambda: list(models.glob(".*/*")))
        demo.signal(signal.SIGINT)
        done = demo.wait(within_s=END_S)

    assert_interrupted(done)
    assert list(models.iterdir()) == []


def test_more_shards_than_layers_are_refused_before_anything_starts(
    pals: Pals, folder: Path
) -> None:
    assert_refused(pals.run("demo", "--shards", "31"), 2, "31 shards for 30 layers", "at most 30")

    assert list(folder.iterdir()) == []
