"""Commands about a swarm that runs, in this process: two models, a shard of each, real links."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import trio

from pals.cli import console
from pals.cli.app import run
from pals.cli.chat.conversation import Conversation
from pals.cli.chat.turns import Answer, stream_answer
from pals.cli.endpoint import Drive, Endpoint, open_endpoint
from pals.cli.process import Member
from pals.config import Profile, SwarmSecret
from pals.driver.bridge import TrioThread
from pals.driver.interface import GenerateParams
from pals.errors import InvalidConfig
from pals.settings import Settings
from pals.swarm.identity import load_or_create_identity
from pals.types import short_id
from tests.checkpoints import make_llama_checkpoint
from tests.integration.swarm import LIMITS, TestSwarm, make_swarm, start_shard

pytestmark = pytest.mark.timeout(120)

LOOPBACK = ("--listen", "/ip4/127.0.0.1/tcp/0", "--no-upnp")
TOKENS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One swarm, in which one peer serves ``first`` and another serves ``second``."""

    first: TestSwarm
    second: TestSwarm

    @property
    def models(self) -> tuple[str, str]:
        return str(self.first.checkpoint), str(self.second.checkpoint)

    def at(self, number: int) -> tuple[str, str]:
        """Return the option that names a peer's profile."""
        return ("--config-dir", str(self.first.peers[number].path))


@asynccontextmanager
async def open_world(folder: Path) -> AsyncIterator[World]:
    other = make_llama_checkpoint(folder / "other", num_layers=2, seed=7)
    limits = replace(LIMITS, max_sessions=1, max_rows=1)
    async with make_swarm(folder, count=2, num_layers=2) as made, trio.open_nursery() as nursery:
        first = replace(made, limits=limits)
        second = replace(first, checkpoint=other)
        for swarm, peer in zip((first, second), made.peers, strict=True):
            await start_shard(nursery, swarm, swarm.options(peer), "0:2")
        yield World(first=first, second=second)
        nursery.cancel_scope.cancel()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    network = TrioThread(partial(open_world, tmp_path_factory.mktemp("w")))
    try:
        yield network.start()
    finally:
        network.stop()


@pytest.fixture(autouse=True)
def levels() -> Iterator[None]:
    """Take back what commands do to the levels of loggers."""
    loggers = [logging.getLogger(name) for name in ("", "pals", "libp2p")]
    kept = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, kept, strict=True):
        logger.setLevel(level)


def document(capsys: pytest.CaptureFixture[str]) -> dict:
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1
    return found


def peer_id(profile: Profile) -> str:
    return load_or_create_identity(profile).peer_id


# --- several models ------------------------------------------------------------------


def open_driver(world: World, *models: str):
    profile = world.first.operator
    entry = profile.load_swarm()
    member = Member(
        profile=profile,
        entry=entry,
        secret=SwarmSecret.parse(entry.swarm_secret),
        identity=load_or_create_identity(profile),
    )
    settings = Settings(node=world.first.options(profile).settings)
    return open_endpoint(member, settings, Drive(models=models), on_crash=lambda: None)


def ask(endpoint: Endpoint, model: str) -> Answer:
    answer = Answer()
    talk = Conversation(params=GenerateParams(temperature=0.0, max_tokens=TOKENS))
    driver = endpoint.drivers[model]
    asyncio.run(stream_answer(driver, talk, "hi", answer, show=lambda _: None))
    return answer


def test_one_node_drives_two_models_and_mixes_nothing_up(world: World) -> None:
    first, second = world.models
    with open_driver(world, first, second) as both:
        one, two = (Path(model).name for model in world.models)
        assert list(both.drivers) == [one, two]
        together = [ask(both, model) for model in (one, two, one)]
    with open_driver(world, second) as alone:
        expected = ask(alone, two)

    served = [short_id(peer_id(peer)) for peer in world.first.peers]
    routes = [answer.completion.route for answer in together if answer.completion is not None]
    assert routes == [(f"{served[i]}[0:2]",) for i in (0, 1, 0)]
    assert together[0].text == together[2].text != together[1].text
    assert together[1].text == expected.text


def test_the_same_files_under_two_names_are_refused(world: World) -> None:
    first, _ = world.models
    with (
        pytest.raises(InvalidConfig, match="has the files of"),
        open_driver(world, first, f"{first}/../{Path(first).name}"),
    ):
        raise AssertionError("it opened")


# --- asking who runs -----------------------------------------------------------------


def test_status_shows_the_shards_of_every_model(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["status", "--json", *world.at(0)]) == 0

    (swarm,) = document(capsys)["swarms"]
    shards = {
        model["model"]: sorted(shard["layers"] for shard in model["shards"])
        for model in swarm["models"]
    }
    one, two = (Path(model).name for model in world.models)
    assert shards == {one: ["0:2"], two: ["0:2"]}
    assert [model["problems"] for model in swarm["models"]] == [[], []]
    own = peer_id(world.first.peers[0])
    paths = {s["peer"]: s["path"] for m in swarm["models"] for s in m["shards"]}
    assert paths[own] == "this machine"


def test_status_of_a_profile_with_which_nothing_runs_looks_around_by_itself(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ("--config-dir", str(world.first.operator.path))

    assert run(["status", "--json", *at]) == 0
    models = document(capsys)["swarms"][0]["models"]
    assert run(["status", "--json", "--offline", *at]) == 0
    offline = document(capsys)["swarms"][0]["models"]

    assert [len(model["shards"]) for model in models] == [1, 1]
    assert offline is None


def test_ping_of_a_profile_with_which_nothing_runs_links_by_itself(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    peer, at = peer_id(world.first.peers[0]), ("--config-dir", str(world.first.operator.path))

    assert run(["ping", peer, "--count", "1", *LOOPBACK, *at]) == 0

    assert "1 try, 0% lost" in capsys.readouterr().out


def test_ps_shows_the_shard_of_a_profile(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ps", "--json", *world.at(1)]) == 0

    (process,) = document(capsys)["processes"]
    (role,) = process["roles"]
    assert process["peer"] == peer_id(world.first.peers[1])
    assert (role["role"], role["layers"]) == ("shard", "0:2")
    assert role["model"] == Path(world.models[1]).name
    assert process["memory_bytes"] > 1 << 20
    assert process["addresses"]


def test_ping_goes_over_the_link_of_who_runs(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    other = peer_id(world.first.peers[1])

    assert run(["ping", other[-8:], "--count", "3", "--json", *world.at(0)]) == 0

    found = document(capsys)
    assert (found["peer"], found["path"], found["loss"]) == (other, "direct", 0.0)
    assert len(found["tries_ms"]) == 3
    assert 0 < found["min_ms"] <= found["avg_ms"] <= found["max_ms"]


def test_ping_of_a_member_that_is_off_says_so(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["ping", peer_id(world.first.operator), *world.at(0)]) == 3

    captured = capsys.readouterr()
    assert "error: " in captured.err
    assert "no way" in captured.out


def test_ping_of_nobody_is_refused(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ping", "12D3KooWnobody", *world.at(0)]) == 2

    assert "pals peers list" in capsys.readouterr().err


# --- talking -------------------------------------------------------------------------


def test_run_answers_once_and_says_how(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = world.first.operator
    options = ("--max-tokens", str(TOKENS), "--temperature", "0", *LOOPBACK)
    command = ["run", world.models[0], "hi", *options, "--config-dir", str(profile.path)]
    secret = profile.load_swarm().swarm_secret
    monkeypatch.setenv("PALS_SWARM_SECRET", secret)
    assert run([*command, "--json"]) == 0
    found = document(capsys)
    monkeypatch.setenv("PALS_SWARM_SECRET", secret)
    assert run(command) == 0

    assert (found["completion_tokens"], found["finish_reason"]) == (TOKENS, "length")
    assert len(found["route"]) == 1
    assert capsys.readouterr().out == console._printable(found["text"]) + "\n"
