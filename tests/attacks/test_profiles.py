"""M11 and M12: secrets stay where they belong, and no answer of a backend touches a profile."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import trio
from litestar.types import ASGIApp, Receive, Scope, Send
from msgspec.structs import replace

from pals.backend.database import sqlite_url
from pals.backend.service import BackendService
from pals.cli.app import run
from pals.config import Profile, SwarmSecret
from pals.errors import PalsError, RosterRefused
from pals.net.enrolment import create_invite, create_swarm, look_up, redeem_invite
from pals.net.removal import Removal, remove_peer, rotate
from pals.swarm.identity import Identity, load_or_create_identity
from pals.swarm.invite import Invite
from pals.swarm.kept import keep_removals, load_removals
from pals.types import PeerId, SwarmId, short_id
from tests.integration.backends import running_app, running_backend
from tests.integration.processes import Pals

NOW = time.time()
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


# --- M11: secrets in argv, environments, logs, files and core dumps ---------------------------


@LINUX
def test_m11_a_process_that_crashes_writes_no_memory_to_disk(tmp_path: Path) -> None:
    pals = Pals({"PALS_CONFIG_DIR": str(tmp_path), "NO_COLOR": "1"})
    with pals.start("backend", "--port", "0", "--json") as backend:
        backend.wait_for_event("ready")
        limits = Path(f"/proc/{backend.pid}/limits").read_text()
    assert re.search(r"Max core file size\s+0\s+0", limits)


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


@dataclass(slots=True)
class Kicking:
    """An operator whose backend was away when it removed a member."""

    operator: Profile
    member: PeerId
    service: BackendService

    def move_to(self, url: str) -> None:
        self.operator.save_swarm(replace(self.operator.load_swarm(), backend_url=url))

    def kick(self) -> Removal:
        return trio.run(partial(remove_peer, self.operator, self.member, now=NOW))

    def waiting(self) -> tuple[bytes, ...]:
        return load_removals(self.operator, SwarmId(bytes.fromhex(self.operator.swarm_ids()[0])))

    def is_listed(self) -> bool:
        return self.member in trio.run(look_up, self.operator).roster.members


@pytest.fixture
def kicking(tmp_path: Path) -> Iterator[Kicking]:
    operator, member = Profile(tmp_path / "operator"), Profile(tmp_path / "member")
    service = BackendService(sqlite_url(tmp_path / "backend.db"))
    with running_backend(service) as url:
        create = partial(create_swarm, name="home", model="org/m", backend_url=url, now=NOW)
        trio.run(create, operator)
        trio.run(redeem_invite, member, trio.run(partial(create_invite, operator, now=NOW)))
        trio.run(look_up, operator)
    found = Kicking(operator, load_or_create_identity(member).peer_id, service)
    removal = found.kick()
    assert (removal.is_listed, len(found.waiting())) == (False, 1)
    yield found
    service.close()


def test_m12_a_kept_removal_that_a_backend_only_says_it_took_stays_kept_until_it_is_listed(
    kicking: Kicking, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, before = kicking.waiting(), kicking.operator.load_swarm()
    at = ("--config-dir", str(kicking.operator.path))
    with running_backend(kicking.service, wrap=pretending) as url:
        kicking.move_to(url)
        statuses = [
            run(["peers", "kick", kicking.member, *at]),
            run(["swarm", "rotate", *at]),
            run(["status", *at]),
        ]
        said = capsys.readouterr().err
        assert kicking.is_listed(), "the backend took it, and shows nothing here"
    assert statuses == [3, 3, 0]
    assert said.count("a record that the backend says it took is not on it") == 2
    assert f"run `pals peers kick {short_id(kicking.member)}` again" in said
    assert "removals wait for the backend (1): run `pals swarm rotate`" in said
    assert kicking.waiting() == kept
    after = kicking.operator.load_swarm()
    assert (after.epoch, after.swarm_secret) == (before.epoch, before.swarm_secret)

    with running_backend(kicking.service) as url:
        kicking.move_to(url)
        removal = kicking.kick()
        assert (removal.is_listed, removal.is_rotated, removal.problem) == (True, True, None)
        assert not kicking.is_listed()
    assert kicking.waiting() == ()
    assert kicking.operator.load_swarm().epoch == before.epoch + 1


def test_m12_a_removal_that_a_backend_only_says_it_took_is_kept(kicking: Kicking) -> None:
    """The first attempt of a kick already meets the backend that lies."""
    keep_removals(kicking.operator, SwarmId(bytes.fromhex(kicking.operator.swarm_ids()[0])), ())
    with running_backend(kicking.service, wrap=pretending) as url:
        kicking.move_to(url)
        removal = kicking.kick()
    assert (removal.is_listed, removal.is_rotated) == (False, False)
    assert isinstance(removal.problem, RosterRefused)
    assert len(kicking.waiting()) == 1
