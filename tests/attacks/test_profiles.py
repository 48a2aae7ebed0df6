"""M11 and M12: secrets stay where they belong, and no answer of a backend touches a profile."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from litestar.types import ASGIApp, Receive, Scope, Send

from pals.backend.database import sqlite_url
from pals.backend.service import BackendService
from pals.config import Profile, SwarmSecret
from pals.errors import PalsError
from pals.net.enrolment import create_invite, create_swarm, redeem_invite
from pals.net.removal import remove_peer, rotate
from pals.swarm.identity import Identity, load_or_create_identity
from pals.swarm.invite import Invite
from pals.types import SwarmId
from tests.integration.backends import running_app, running_backend
from tests.integration.processes import Pals

NOW = time.time()
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


# --- M11: secrets in argv, environments, logs, files and core dumps ---------------------------


class Watch:
    """Looks at everything that one `Pals` starts, again and again."""

    def __init__(self, pals: Pals) -> None:
        self._pals = pals
        self._ended = threading.Event()
        self.command_lines: set[bytes] = set()
        self.inherited: dict[int, bytes] = {}

    def look(self) -> None:
        for pid, command_line in self._pals.processes().items():
            self.command_lines.add(command_line)
            folder = Path("/proc", str(pid))
            try:
                parent = int(re.findall(r"PPid:\s+(\d+)", (folder / "status").read_text())[0])
                environ = (folder / "environ").read_bytes()
            except (OSError, IndexError):  # it ended meanwhile
                continue
            if parent in self._pals.processes():
                self.inherited[pid] = environ

    @contextmanager
    def running(self) -> Iterator[None]:
        def repeat() -> None:
            while not self._ended.wait(0.1):
                self.look()

        thread = threading.Thread(target=repeat)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()


@LINUX
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_m11_commands_show_no_secret_but_the_invite_that_was_asked_for(tmp_path: Path) -> None:
    operator, joiner = tmp_path / "operator", tmp_path / "joiner"
    pals = Pals({"PALS_CONFIG_DIR": str(operator), "NO_COLOR": "1"})
    watch = Watch(pals)
    said: list[str] = []
    with watch.running(), pals.start("backend", "--port", "0", "--json") as backend:
        url = str(backend.wait_for_event("ready")["url"])
        watch.look()
        names = ("--name", "home", "--model", "org/model", "--backend", url)
        created = pals.run("swarm", "create", *names)
        asked = pals.run("invite", "create", "--json")
        invite = json.loads(asked.out)["invite"]
        at = ("--config-dir", str(joiner))
        login = pals.run("login", *at, PALS_INVITE=invite)
        refused = pals.run("login", invite, *at)
        listed = pals.run("peers", "list", *at)
        said += [text for run in (created, login, refused, listed) for text in (run.out, run.err)]
        said.append(asked.err)
        statuses = (created.status, asked.status, login.status, listed.status)
    assert statuses == (0, 0, 0, 0), said
    assert refused.status != 0
    secrets = secrets_of(Profile(operator), Profile(joiner), invite)
    everything = "".join(said).encode() + b"".join(watch.inherited.values())
    assert not [secret for secret in secrets if secret in everything]
    lines = b"".join(line for line in watch.command_lines if invite.encode() not in line)
    assert not [secret for secret in secrets if secret in lines]
    assert len(watch.command_lines) >= 5
    assert_files_are_private(tmp_path, secrets)


@LINUX
def test_m11_a_process_that_crashes_writes_no_memory_to_disk(tmp_path: Path) -> None:
    pals = Pals({"PALS_CONFIG_DIR": str(tmp_path), "NO_COLOR": "1"})
    with pals.start("backend", "--port", "0", "--json") as backend:
        backend.wait_for_event("ready")
        limits = Path(f"/proc/{backend.pid}/limits").read_text()
    assert re.search(r"Max core file size\s+0\s+0", limits)


def secrets_of(operator: Profile, joiner: Profile, invite: str) -> list[bytes]:
    entry, parsed = joiner.load_swarm(), Invite.parse(invite)
    keys = [load_or_create_identity(profile).reveal_seed() for profile in (operator, joiner)]
    raw = [parsed.secret.reveal(), parsed.auth, *keys]
    texts = [invite, *invite.removeprefix("pp_inv_").split("."), entry.swarm_secret]
    if entry.peer_credential:
        texts.append(entry.peer_credential)
    return [*raw, *(value.hex().encode() for value in raw), *(text.encode() for text in texts)]


def assert_files_are_private(folder: Path, secrets: list[bytes]) -> None:
    """Assert that whatever holds a secret is readable by its user alone."""
    holding = [
        path
        for path in folder.rglob("*")
        if path.is_file() and any(secret in path.read_bytes() for secret in secrets)
    ]
    assert len(holding) >= 2
    assert {oct(path.stat().st_mode & 0o777) for path in holding} == {"0o600"}
    assert {oct(path.parent.stat().st_mode & 0o777) for path in holding} == {"0o700"}
    assert not [path for path in holding if path.name.startswith("backend.db")]


# --- M12: an error overwrites nothing ------------------------------------------------------------

Attempt = Callable[[Profile], Awaitable[object]]
ATTEMPTS: dict[str, Attempt] = {
    "invite": lambda profile: create_invite(profile, now=NOW),
    "kick": lambda profile: remove_peer(profile, "12D3KooW" + "x" * 44, now=NOW),
    "rotate": lambda profile: rotate(profile, now=NOW),
}
ANSWERS = [
    (400, b"{}"),
    (401, b'{"error":{"code":"x","message":"no"}}'),
    (403, b""),
    (500, b"\xff\xfe"),
    (503, b'{"error":{"code":"PALS-BACKEND-STORAGE","message":"no"}}'),
    (307, b""),
    (200, b"garbage"),
    (200, b"[" * 100_000),
    (200, b'{"entries":[],"entry":1}'),
    (200, b'{"entry":"AAAA","entries":["AAAA"]}'),
]


def answering(status: int, body: bytes) -> ASGIApp:
    """Return an application that answers every request alike."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    return answer


def files(profile: Profile) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in profile.path.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Return the profile of an operator whose backend is gone."""
    folder = tmp_path_factory.mktemp("lock-out")
    profile = Profile(folder / "operator")
    service = BackendService(sqlite_url(folder / "backend.db"))
    with running_backend(service) as url:

        async def found() -> None:
            await create_swarm(profile, name="home", model="org/m", backend_url=url, now=NOW)

        trio.run(found)
    service.close()
    return profile


@pytest.mark.trio
@pytest.mark.parametrize("attempt", ATTEMPTS)
@pytest.mark.parametrize(("status", "body"), ANSWERS)
async def test_m12_no_answer_of_a_backend_changes_the_operator_s_profile(
    operator: Profile, attempt: str, status: int, body: bytes
) -> None:
    with running_app(answering(status, body)) as bad_url:
        path = operator.swarm_folder(operator.swarm_ids()[0]) / "swarm.json"
        entry = json.loads(path.read_bytes())
        path.write_text(json.dumps(entry | {"backend_url": bad_url}))
        before = files(operator)
        with pytest.raises(PalsError):
            await ATTEMPTS[attempt](operator)
        assert files(operator) == before


@pytest.mark.trio
@pytest.mark.parametrize(("status", "body"), ANSWERS)
async def test_m12_a_refused_login_makes_no_member_and_overwrites_nothing(
    operator: Profile, tmp_path: Path, status: int, body: bytes
) -> None:
    held, joiner = operator.load_swarm(), Profile(tmp_path / "joiner")
    with running_app(answering(status, body)) as bad_url:
        invite = Invite.generate(
            swarm_id=SwarmId(bytes.fromhex(held.swarm_id)),
            backend_url=bad_url,
            epoch=held.epoch,
            secret=SwarmSecret.parse(held.swarm_secret),
        )
        before = files(operator)
        for profile in (joiner, operator):
            with pytest.raises(PalsError):
                await redeem_invite(profile, invite.to_text())
    assert joiner.swarm_ids() == []
    assert files(operator) == before


def pretending(app: ASGIApp) -> ASGIApp:
    """Make a backend that shows its list honestly, and says of every record that it took it."""
    pretend = answering(200, b'{"entry":"AAAA"}')

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        is_record = scope["type"] == "http" and scope["path"].endswith("/records")
        if is_record and scope["method"] == "POST":
            await pretend(scope, receive, send)
        else:
            await app(scope, receive, send)

    return answer


@pytest.mark.trio
@pytest.mark.parametrize("attempt", ["invite", "rotate"])
async def test_m12_a_backend_that_only_says_that_it_took_a_record_moves_nobody_into_another_epoch(
    tmp_path: Path, attempt: str
) -> None:
    operator = Profile(tmp_path / "operator")
    service = BackendService(sqlite_url(tmp_path / "backend.db"), signer=Identity.generate())
    with running_backend(service) as url:
        await create_swarm(operator, name="home", model="org/m", backend_url=url, now=NOW)
    with running_backend(service, wrap=pretending) as url:
        path = operator.swarm_folder(operator.swarm_ids()[0]) / "swarm.json"
        path.write_text(json.dumps(json.loads(path.read_bytes()) | {"backend_url": url}))
        before = path.read_bytes()
        with pytest.raises(PalsError):
            await ATTEMPTS[attempt](operator)
        assert path.read_bytes() == before
    service.close()
