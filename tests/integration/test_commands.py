"""The commands of a member as processes: bad input, secrets, signals.

A process takes seconds, so that one case stands for its kind: the unit tests have them all.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import socketserver
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import pytest
import trio

from pals.backend.database import sqlite_url
from pals.backend.service import BackendService
from pals.config import Profile
from pals.models.hub_texts import TEXT_ATTEMPTS
from pals.net.enrolment import create_invite, create_swarm, redeem_invite
from pals.net.removal import remove_peer
from pals.swarm.identity import load_or_create_identity
from tests.checkpoints import make_llama_checkpoint
from tests.integration.backends import running_backend
from tests.integration.processes import DEADLINE_S, END_S, Pals, assert_refused

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

NUM_LAYERS = 4
SMALL = ("--threads", "1", "--context", "64", "--sessions", "1", "--dtype", "f32")
LOOPBACK = ("--listen", "/ip4/127.0.0.1/tcp/0")
API_KEY = "canary-api-key-0123456789"
NOW = 1e9


@dataclass(slots=True, kw_only=True)
class Swarm:
    """A real backend with a swarm for a tiny model, and as many members as tests want."""

    folder: Path
    url: str
    model: Path
    operator: Profile
    count: int = 0

    def invite(self) -> str:
        return trio.run(partial(create_invite, self.operator, now=NOW))

    def new_folder(self) -> Path:
        self.count += 1
        return self.folder / f"profile-{self.count}"

    def join(self) -> Profile:
        """Return the profile of a new member."""
        profile = Profile(self.new_folder())
        trio.run(redeem_invite, profile, self.invite())
        return profile

    def kick(self, profile: Profile) -> None:
        peer = load_or_create_identity(profile).peer_id
        trio.run(partial(remove_peer, self.operator, peer, now=NOW))


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    folder = tmp_path_factory.mktemp("commands")
    model = make_llama_checkpoint(folder / "tiny", num_layers=NUM_LAYERS)
    operator = Profile(folder / "operator")
    service = BackendService(sqlite_url(folder / "backend.db"))
    with running_backend(service) as url:
        create = partial(create_swarm, name="test", model=str(model), backend_url=url, now=NOW)
        trio.run(create, operator)
        yield Swarm(folder=folder, url=url, model=model, operator=operator)
    service.close()


@pytest.fixture
def pals(tmp_path: Path, shared_cache: Path) -> Pals:
    return Pals(
        {
            "HF_HUB_OFFLINE": "1",
            "NO_COLOR": "1",
            "PALS_CACHE_DIR": str(shared_cache),
            "PALS_CONFIG_DIR": str(tmp_path / "default-profile"),
        }
    )


def at(profile: Profile | Path) -> tuple[str, str]:
    path = profile.path if isinstance(profile, Profile) else profile
    return ("--config-dir", str(path))


def edit_entry(profile: Profile, **changes: object) -> None:
    (path,) = profile.path.glob("swarms/*/swarm.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file under a folder, but the lock, with what is in it."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


# --- the profile ---------------------------------------------------------------------


@pytest.mark.parametrize("command", [("shard", "--layers", "0:2"), ("serve",)])
def test_a_member_command_without_a_profile_says_how_to_get_one(
    pals: Pals, tmp_path: Path, command: tuple[str, ...]
) -> None:
    folder = tmp_path / "absent"

    assert_refused(pals.run(*command, *at(folder)), 2, str(folder), "pals init")

    assert not folder.exists()


def test_a_profile_without_a_swarm_is_told_to_join_one(pals: Pals, tmp_path: Path) -> None:
    assert pals.run("init", *at(tmp_path / "p")).status == 0
    before = contents(tmp_path / "p")

    done = pals.run("shard", "--layers", "0:2", *at(tmp_path / "p"))

    assert_refused(done, 2, "belongs to no swarm", "pals login")
    assert contents(tmp_path / "p") == before


@pytest.mark.parametrize(
    ("pattern", "mode"),
    [(".", 0o755), ("swarms/*/swarm.json", 0o644), ("identity.key", 0o640)],
    ids=["folder", "secret", "identity"],
)
def test_a_profile_that_others_can_read_is_refused_with_the_chmod(
    pals: Pals, swarm: Swarm, pattern: str, mode: int
) -> None:
    profile = swarm.join()
    (exposed,) = [profile.path] if pattern == "." else profile.path.glob(pattern)
    exposed.chmod(mode)

    done = pals.run("shard", "--layers", "0:2", *at(profile))

    wanted = "700" if pattern == "." else "600"
    assert_refused(done, 2, str(exposed), f"mode {mode:o}", f"chmod {wanted} {exposed}")


@pytest.mark.parametrize("command", [("shard", "--layers", "0:2"), ("serve", "--port", "0")])
def test_a_malformed_swarm_secret_in_the_environment_is_refused_and_not_shown(
    pals: Pals, swarm: Swarm, command: tuple[str, ...]
) -> None:
    text = "c2hvcnQtY2FuYXJ5"

    done = pals.run(*command, *at(swarm.operator), PALS_SWARM_SECRET=text)

    assert_refused(done, 2, "the swarm secret is", "pals login")
    assert text not in done.err


@pytest.mark.parametrize("command", [("shard", "--layers", "0:2"), ("serve", "--port", "0")])
def test_without_a_swarm_secret_nothing_is_served_in_plain_text(
    pals: Pals, swarm: Swarm, command: tuple[str, ...]
) -> None:
    profile = swarm.join()
    edit_entry(profile, swarm_secret="")

    done = pals.run(*command, *at(profile), PALS_SWARM_SECRET="")

    assert_refused(done, 2, "the swarm secret is missing")


def test_a_damaged_profile_is_named(pals: Pals, swarm: Swarm) -> None:
    profile = swarm.join()
    edit_entry(profile, epoch="x")

    assert_refused(pals.run("shard", "--layers", "0:2", *at(profile)), 2, "swarm.json")


# --- layers, models, addresses -------------------------------------------------------


@pytest.mark.parametrize("layers", ["x", "-1:2"])
@pytest.mark.parametrize("command", [("shard",), ("serve", "--port", "0")])
def test_layers_that_are_no_range_are_refused(
    pals: Pals, swarm: Swarm, command: tuple[str, ...], layers: str
) -> None:
    done = pals.run(*command, f"--layers={layers}", *at(swarm.operator))

    assert_refused(done, 2, f"`{layers}`", "--layers 0:10")


def test_layers_outside_the_model_name_how_many_there_are(pals: Pals, swarm: Swarm) -> None:
    done = pals.run("shard", "--layers", "2:9", *LOOPBACK, *at(swarm.operator))

    assert_refused(done, 2, "`2:9`", f"`0:{NUM_LAYERS}`")


@pytest.mark.parametrize("command", [("shard", "--layers", "0:2"), ("serve", "--port", "0")])
@pytest.mark.parametrize(
    "network",
    [
        {"HF_HUB_OFFLINE": "1"},
        {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"},
        {"HF_HUB_OFFLINE": "0", "HTTPS_PROXY": "http://127.0.0.1:9"},
    ],
    ids=["offline", "dead-endpoint", "dead-proxy"],
)
def test_a_model_that_is_nowhere_is_refused_at_once_without_a_network(
    pals: Pals, swarm: Swarm, tmp_path: Path, command: tuple[str, ...], network: dict[str, str]
) -> None:
    name, *rest = command
    cache = {"PALS_CACHE_DIR": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}

    done = pals.run(
        name, "nobody/no-model", *rest, *LOOPBACK, *at(swarm.operator), **network, **cache
    )

    assert_refused(done, 4, "nobody/no-model", "pals models import")


def test_a_hub_that_hangs_up_is_asked_a_few_times_and_not_on_and_on(
    pals: Pals, swarm: Swarm, tmp_path: Path
) -> None:
    cache = {"PALS_CACHE_DIR": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}
    with hanging_up() as (url, asked):
        hub = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": url}
        command = ("shard", "nobody/no-model", "--layers", "0:2", *LOOPBACK)
        done = pals.run(*command, *at(swarm.operator), **hub, **cache)

    assert_refused(done, 4, "nobody/no-model", "pals models import")
    assert len(asked) == TEXT_ATTEMPTS


@contextmanager
def hanging_up() -> Iterator[tuple[str, list[object]]]:
    """Give the address of a server that answers nobody, and who asked it."""
    asked: list[object] = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            asked.append(self.client_address)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("model", ["../outside", "no/such/model"])
def test_a_model_name_that_cannot_be_one_is_refused(pals: Pals, swarm: Swarm, model: str) -> None:
    done = pals.run("shard", model, "--layers", "0:2", *LOOPBACK, *at(swarm.operator))

    assert_refused(done, 4, model)


@pytest.mark.parametrize("address", ["nonsense", "/ip4/127.0.0.1/tcp/1", "/p2p/", "127.0.0.1:1"])
def test_a_peer_that_is_no_multiaddr_is_refused(pals: Pals, swarm: Swarm, address: str) -> None:
    done = pals.run("shard", "--layers", "0:2", *LOOPBACK, "--peer", address, *at(swarm.operator))

    assert_refused(done, 2, f"`{address}`")


@pytest.mark.parametrize("command", [("shard", "--layers", "0:2"), ("serve", "--port", "0")])
def test_a_listen_address_that_is_no_multiaddr_is_refused(
    pals: Pals, swarm: Swarm, command: tuple[str, ...]
) -> None:
    address = "/ip4/300.1.1.1/tcp/1"

    done = pals.run(*command, "--listen", address, *at(swarm.operator))

    assert_refused(done, 2, f"`{address}`", "/ip4/0.0.0.0/tcp/4001")


def test_a_taken_libp2p_port_is_named(pals: Pals, swarm: Swarm) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        listen = f"/ip4/127.0.0.1/tcp/{port}"
        done = pals.run("shard", "--layers", "0:2", "--listen", listen, *at(swarm.operator))

    assert_refused(done, 2, f"127.0.0.1:{port}")


def test_a_taken_http_port_is_named(pals: Pals, swarm: Swarm) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = pals.run("serve", "--port", port, *LOOPBACK, *at(swarm.operator))

    assert_refused(done, 2, f"127.0.0.1:{port}", "--port")


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_a_public_bind_without_a_key_is_refused_before_anything_else(
    pals: Pals, tmp_path: Path, host: str
) -> None:
    done = pals.run("serve", f"--host={host}", *at(tmp_path / "absent"))

    assert_refused(done, 2, f"`{host}`", "PALS_API_KEY")


def test_a_short_api_key_is_refused_before_the_network_starts(pals: Pals, swarm: Swarm) -> None:
    done = pals.run("serve", "--port", "0", *at(swarm.operator), PALS_API_KEY="short-key")

    assert_refused(done, 2, "PALS_API_KEY", "at least 16")
    assert "short-key" not in done.err


# --- the backend and the member list -------------------------------------------------


@pytest.mark.parametrize("command", [("shard", "--layers", "0:2"), ("serve", "--port", "0")])
def test_nothing_is_served_without_a_member_list(
    pals: Pals, swarm: Swarm, command: tuple[str, ...]
) -> None:
    profile = swarm.join()
    edit_entry(profile, backend_url="http://127.0.0.1:9")
    for saved in profile.path.glob("swarms/*/roster.bin"):
        saved.unlink()

    done = pals.run(*command, *LOOPBACK, *at(profile))

    assert_refused(done, 3, "no verified member list", "http://127.0.0.1:9")


@pytest.mark.parametrize("command", [("shard", "--layers", "0:2"), ("serve", "--port", "0")])
def test_a_removed_member_is_told_so_and_does_not_run(
    pals: Pals, swarm: Swarm, command: tuple[str, ...]
) -> None:
    profile = swarm.join()
    swarm.kick(profile)

    done = pals.run(*command, *LOOPBACK, *at(profile))

    assert_refused(done, 3, "is not a member", "pals login")


def test_a_member_removed_while_it_serves_ends_within_a_poll(
    pals: Pals, swarm: Swarm, tmp_path: Path
) -> None:
    profile = swarm.join()
    preset = tmp_path / "often.toml"
    preset.write_text("[node]\npoll_interval_s = 0.2\n")
    command = ("shard", "--layers", "0:4", "--preset", preset, *SMALL, *LOOPBACK, *at(profile))
    with pals.start(*command, "--json") as shard:
        shard.wait_for_event("shard-ready")
        swarm.kick(profile)
        done = shard.wait(within_s=END_S)

    assert done.status == 3
    assert "is not a member" in done.err
    assert "Traceback" not in done.err


# --- invites -------------------------------------------------------------------------


def test_a_damaged_invite_is_refused_and_leaves_nothing(pals: Pals, swarm: Swarm) -> None:
    invite = swarm.invite()
    damaged = invite[:-3] + ("AAA" if invite[-3:] != "AAA" else "BBB")
    folder = swarm.new_folder()

    for text in (damaged, invite[:40], "pp_inv_", "hello"):
        by_environment = pals.run("login", *at(folder), PALS_INVITE=text)
        by_input = pals.run("login", *at(folder), stdin=f"{text}\n")
        assert_refused(by_environment, 2, "not a valid invite")
        assert_refused(by_input, 2, "not a valid invite")
        assert invite[7:40] not in by_environment.err + by_input.err

    assert not folder.exists()


def test_a_spent_invite_is_refused_and_makes_no_member(pals: Pals, swarm: Swarm) -> None:
    invite = swarm.invite()
    first, second = swarm.new_folder(), swarm.new_folder()
    assert pals.run("login", *at(first), PALS_INVITE=invite).status == 0

    by_environment = pals.run("login", *at(second), PALS_INVITE=invite)
    by_input = pals.run("login", *at(second), stdin=invite)

    for done in (by_environment, by_input):
        assert_refused(done, 2, "spent", "ask the operator")
    assert not list(second.glob("swarms/*"))


def test_an_invite_in_argv_is_refused_and_not_repeated(pals: Pals, swarm: Swarm) -> None:
    invite = swarm.invite()
    folder = swarm.new_folder()

    done = pals.run("login", invite, *at(folder))

    assert_refused(done, 2, "not taken from the command line", "PALS_INVITE")
    assert invite[:20] not in done.err
    assert not folder.exists()


def test_login_on_a_member_changes_nothing(pals: Pals, swarm: Swarm) -> None:
    profile = swarm.join()
    before = contents(profile.path)
    invite = swarm.invite()

    assert_refused(pals.run("login", *at(profile), PALS_INVITE=invite), 2, "already belongs")

    assert contents(profile.path) == before
    other = swarm.new_folder()
    assert pals.run("login", *at(other), PALS_INVITE=invite).status == 0, "the invite was spent"


# --- running -------------------------------------------------------------------------


def test_a_key_on_the_command_line_leaves_the_process_list(pals: Pals, swarm: Swarm) -> None:
    command = ("serve", "--host", "0.0.0.0", "--port", "0", "--api-key", API_KEY, "--json")
    with pals.start(*command, *LOOPBACK, *at(swarm.operator)) as server:
        url = str(server.wait_for_event("ready")["url"]).replace("0.0.0.0", "127.0.0.1")
        command_lines = b"".join(pals.processes().values())
        without = httpx.get(f"{url}/v1/models")
        wrong = httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer wrong"})
        right = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {API_KEY}"})
        server.signal(signal.SIGTERM)
        done = server.wait(within_s=END_S)

    assert (without.status_code, wrong.status_code, right.status_code) == (401, 401, 200)
    assert API_KEY.encode() not in command_lines
    assert b"--api-key" not in command_lines
    assert API_KEY not in done.out + done.err
    assert done.status == 0


def test_one_identity_runs_once_and_the_other_process_is_named(pals: Pals, swarm: Swarm) -> None:
    profile = swarm.join()
    with pals.start("shard", "--layers", "0:4", "--json", *SMALL, *LOOPBACK, *at(profile)) as shard:
        shard.wait_for_event("shard-ready")
        second_shard = pals.run("shard", "--layers", "0:2", *LOOPBACK, *at(profile))
        second_serve = pals.run("serve", "--port", "0", *LOOPBACK, *at(profile))
        shard.signal(signal.SIGTERM)
        done = shard.wait(within_s=END_S)

    for refused in (second_shard, second_serve):
        assert_refused(refused, 2, str(profile.path), f"process {shard.pid}")
    assert done.status == 0
    assert pals.processes() == {}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.parametrize("serves", ["shard", "serve", "both"])
def test_a_signal_ends_a_server_in_order(
    pals: Pals, swarm: Swarm, serves: str, number: signal.Signals, status: int
) -> None:
    layers = ("--layers", "0:4", *SMALL)
    command = {
        "shard": ("shard", *layers),
        "serve": ("serve", "--port", "0"),
        "both": ("serve", "--port", "0", *layers),
    }[serves]
    event = "ready" if serves == "serve" else "shard-ready"
    with pals.start(*command, "--json", *LOOPBACK, *at(swarm.operator)) as server:
        server.wait_for_event(event)
        server.signal(number)
        done = server.wait(within_s=END_S)

    assert done.status == status, done.err
    assert done.err.count("error") == 0
    assert "Traceback" not in done.err


def test_a_signal_while_a_shard_loads_ends_it(pals: Pals, swarm: Swarm) -> None:
    command = ("shard", "--layers", "0:4", *SMALL, *LOOPBACK, *at(swarm.operator))
    with pals.start(*command) as shard:
        note = shard.wait_for_note("loading layers")
        shard.signal(signal.SIGTERM)
        done = shard.wait(within_s=END_S)

    assert (done.status, done.err) == (0, note)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.parametrize("command", [("shard", "--layers", "0:2"), ("serve", "--port", "0")])
def test_a_signal_ends_a_server_that_waits_for_a_silent_backend(
    pals: Pals, swarm: Swarm, command: tuple[str, ...], number: signal.Signals, status: int
) -> None:
    profile = swarm.join()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(DEADLINE_S)
        edit_entry(profile, backend_url=f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pals.start(*command, *LOOPBACK, *at(profile)) as server:
            connection, _ = silent.accept()
            with connection:
                server.signal(number)
                done = server.wait(within_s=END_S)

    assert done.status == status, done.err
    assert done.err == ""


def test_secrets_show_neither_in_the_process_list_nor_in_logs(pals: Pals, swarm: Swarm) -> None:
    invite = swarm.invite()
    folder = swarm.new_folder()
    login = pals.run("login", *at(folder), PALS_INVITE=invite)
    assert login.status == 0
    entry = Profile(folder).load_swarm()
    layers = ("--layers", "0:4", *SMALL)
    member = ("--verbose", "--json", *LOOPBACK, *at(folder))
    operator = ("--verbose", "--json", *LOOPBACK, *at(swarm.operator))
    with (
        pals.start("shard", *layers, *member) as shard,
        pals.start("serve", "--port", "0", *operator, PALS_API_KEY=API_KEY) as server,
    ):
        shard.wait_for_event("shard-ready")
        url = server.wait_for_event("ready")["url"]
        answer = httpx.post(
            f"{url}/v1/chat/completions",
            json={
                "model": swarm.model.name,
                "messages": [{"role": "user", "content": "canary prompt"}],
                "max_tokens": 4,
            },
            headers={"authorization": f"Bearer {API_KEY}"},
            timeout=40,
        )
        command_lines = b"".join(pals.processes().values())
        for process in (shard, server):
            process.signal(signal.SIGTERM)
        logs = [process.wait(within_s=END_S) for process in (shard, server)]

    assert answer.status_code == 200, answer.text
    assert b"serve" in command_lines
    assert "loading layers" in logs[0].err
    assert "prompt tokens from" in logs[1].err, "without a log the search below proves nothing"
    written = login.out + login.err + "".join(log.out + log.err for log in logs)
    secrets = (entry.swarm_secret, entry.peer_credential, invite, API_KEY, "canary prompt")
    for secret in secrets:
        assert secret not in written
        assert secret.encode() not in command_lines
    assert not re.search(r"pp_inv_\w", written)
    assert os.fsencode(folder) in command_lines
