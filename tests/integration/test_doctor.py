"""`pals doctor` in a real swarm: asked of a running member, or by a member of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio

from pals.cli import doctor
from pals.cli.app import run
from pals.config import Profile
from pals.net import report, report_socket
from pals.net.node import open_node
from pals.net.report import report_network
from pals.net.report_socket import ask_list, ask_running, socket_path
from pals.net.standing import look_at
from tests.integration.swarm import make_swarm

pytestmark = [pytest.mark.trio, pytest.mark.timeout(120)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the checks of this machine, and what waits for members that are silent."""
    monkeypatch.setattr(doctor, "CHECKS", ())
    monkeypatch.setattr(report, "FIND_S", 0.5)
    monkeypatch.setattr(report, "CONNECT_S", 1.0)


async def ask_doctor(profile: Profile, *options: str) -> int:
    command = ["doctor", "--config-dir", str(profile.path), *options]
    return await trio.to_thread.run_sync(run, command)


async def test_a_running_member_says_how_it_reaches_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with (
        make_swarm(tmp_path, count=2) as swarm,
        open_node(swarm.options(swarm.peers[0])) as other,
        open_node(swarm.options(swarm.peers[1])) as node,
    ):
        status = await ask_doctor(swarm.peers[1], "--json")

        document = json.loads(capsys.readouterr().out)
        assert status == 0
        assert [c["code"] for c in document["checks"]] == ["DOCTOR-NETWORK"]
        assert document["network"]["peer"] == node.peer_id
        found = {peer["peer"]: peer for peer in document["network"]["peers"]}
        assert found[other.peer_id]["path"] == "direct"
        assert found[other.peer_id]["round_trip_ms"] > 0
        operator = found.keys() - {other.peer_id}
        assert [found[o]["code"] for o in operator] == ["PALS-PEER-UNREACHABLE"]


async def test_without_a_running_member_doctor_runs_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with (
        make_swarm(tmp_path, count=2) as swarm,
        open_node(swarm.options(swarm.peers[0])) as other,
    ):
        status = await ask_doctor(
            swarm.peers[1], "--listen", "/ip4/127.0.0.1/tcp/0", "--peer", other.host.addresses()[0]
        )

        lines = capsys.readouterr().out.splitlines()
        assert status == 0
        (row,) = [line for line in lines if line.startswith(other.peer_id)]
        assert row.split()[1] == "direct"
        assert row.endswith(" ms")
        assert not socket_path(swarm.peers[1].path).exists()


async def test_members_are_left_out_when_asked_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with make_swarm(tmp_path, count=1) as swarm:
        assert await ask_doctor(swarm.peers[0], "--offline", "--json") == 0

    assert json.loads(capsys.readouterr().out)["network"] is None


async def test_only_the_user_can_ask_a_running_member(tmp_path: Path) -> None:
    async with make_swarm(tmp_path, count=1) as swarm:
        profile = swarm.peers[0].path
        assert await ask_running(profile) is None
        async with open_node(swarm.options(swarm.peers[0])) as node:
            assert socket_path(profile).stat().st_mode & 0o777 == 0o600
            assert await ask_running(profile) == await report_network(node)
        assert not socket_path(profile).exists()


async def test_a_running_member_says_how_its_list_stands(tmp_path: Path) -> None:
    async with make_swarm(tmp_path, count=1) as swarm:
        profile = swarm.peers[0]
        assert await ask_list(profile.path) is None
        async with open_node(swarm.options(profile)):
            found = await ask_list(profile.path)
            standing = await look_at(profile, profile.load_swarm())
        assert found is not None
        assert (found.swarm_id, found.state) == (profile.load_swarm().swarm_id, "fresh")
        assert found.alarms == standing.alarms == ()
        assert (standing.state, standing.part) == ("fresh", "member")


async def test_another_question_is_answered_by_nothing(tmp_path: Path) -> None:
    async with make_swarm(tmp_path, count=1) as swarm, open_node(swarm.options(swarm.peers[0])):
        for question in (b"lists\n", b"list", b"x" * 100, b""):
            stream = await trio.open_unix_socket(str(socket_path(swarm.peers[0].path)))
            async with stream:
                await stream.send_all(question)
                await stream.send_eof()
                with trio.fail_after(10):
                    assert await answer_of(stream) == b""


async def answer_of(stream: trio.SocketStream) -> bytes:
    """Return what comes; whoever is not read to the end may be told so by a reset."""
    try:
        return await stream.receive_some(100)
    except trio.BrokenResourceError:
        return b""


async def test_a_socket_that_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    async with make_swarm(tmp_path, count=1) as swarm:
        path = socket_path(swarm.peers[0].path)
        path.touch()
        async with open_node(swarm.options(swarm.peers[0])):
            assert await ask_running(swarm.peers[0].path) is not None


async def test_a_profile_whose_path_is_too_long_runs_without_a_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_socket, "MAX_SOCKET_PATH_BYTES", 1)
    async with make_swarm(tmp_path, count=1) as swarm, open_node(swarm.options(swarm.peers[0])):
        assert await ask_running(swarm.peers[0].path) is None
