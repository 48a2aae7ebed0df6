"""Enrolment against a real backend, and against backends that lie or fail."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio
from litestar.types import ASGIApp, Receive, Scope, Send

from pals.backend.database import sqlite_url
from pals.backend.service import BackendService, EntryList
from pals.config import Profile
from pals.errors import (
    AlreadyMember,
    BackendRefused,
    BackendUnreachable,
    InvalidConfig,
    InvalidInvite,
    InvalidRecord,
    InviteRefused,
    NoSwarm,
    NotOperator,
    PalsError,
    ProfileInUse,
    RosterRefused,
    RosterUnavailable,
    UnknownPeer,
)
from pals.net import membership
from pals.net.administration import load_operator
from pals.net.enrolment import (
    create_invite,
    create_swarm,
    look_up,
    redeem_invite,
)
from pals.net.membership import MembershipClient, first_roster, load_saved, save_roster
from pals.net.removal import remove_peer
from pals.swarm.allowlist import MAX_STALE_S, AllowList
from pals.swarm.freshness import sign_freshness
from pals.swarm.hints import sign_hint
from pals.swarm.identity import load_or_create_identity
from pals.swarm.invite import Invite
from pals.types import SwarmId
from tests.integration.backends import running_app, running_backend
from tests.unit.swarm.chains import Chain

NOW = time.time()
FOUNDING = 2  # entries of a new swarm: the genesis, and the backend's appointment

pytestmark = pytest.mark.trio


class Backend(BackendService):
    """A backend whose list the test may replace with any other."""

    lie: tuple[bytes, ...] | None = None

    def entries(self, swarm_id: SwarmId, known: str | None = None) -> EntryList:
        if self.lie is not None:
            return EntryList(entries=self.lie, etag=f"{len(self.lie)}-lie")
        return super().entries(swarm_id, known)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Backend]:
    service = Backend(sqlite_url(tmp_path / "backend" / "backend.db"))
    yield service
    service.close()


@pytest.fixture
def url(service: Backend) -> Iterator[str]:
    with running_backend(service) as url:
        yield url


@pytest.fixture
def operator(tmp_path: Path) -> Profile:
    return Profile(tmp_path / "operator")


@pytest.fixture
def joiner(tmp_path: Path) -> Profile:
    return Profile(tmp_path / "joiner")


async def found(profile: Profile, url: str) -> None:
    await create_swarm(profile, name="home", model="org/model", backend_url=url, now=NOW)


def files(profile: Profile) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in profile.path.rglob("*") if path.is_file()}


async def test_operator_invites_and_joiner_gets_the_secret(
    operator: Profile, joiner: Profile, url: str
) -> None:
    await found(operator, url)
    entry = await redeem_invite(joiner, await create_invite(operator, now=NOW))
    own = operator.load_swarm()
    assert joiner.load_swarm() == entry
    assert (entry.swarm_id, entry.swarm_secret, entry.epoch) == (
        own.swarm_id,
        own.swarm_secret,
        own.epoch,
    )
    assert (entry.name, entry.model, entry.backend_url) == ("home", "org/model", url)
    for profile in (operator, joiner):
        members = (await look_up(profile)).roster.members
        assert members == {load_or_create_identity(p).peer_id for p in (operator, joiner)}


async def test_secrets_on_disk_are_private(operator: Profile, joiner: Profile, url: str) -> None:
    await found(operator, url)
    await redeem_invite(joiner, await create_invite(operator, now=NOW))
    for path in [*files(operator), *files(joiner)]:
        assert path.stat().st_mode & 0o777 == 0o600


async def test_kicked_peer_leaves_the_list_and_cannot_return(
    operator: Profile, joiner: Profile, tmp_path: Path, url: str
) -> None:
    await found(operator, url)
    invite = await create_invite(operator, max_uses=5, now=NOW)
    await redeem_invite(joiner, invite)
    peer = load_or_create_identity(joiner).peer_id
    await remove_peer(operator, peer, now=NOW)
    assert peer not in (await look_up(joiner)).roster.members
    again = Profile(tmp_path / "again")
    with pytest.raises(InviteRefused):
        await redeem_invite(again, invite)
    with pytest.raises(UnknownPeer):
        await remove_peer(operator, peer, now=NOW)


async def test_operator_does_not_lock_itself_out(operator: Profile, url: str) -> None:
    await found(operator, url)
    own = load_or_create_identity(operator).peer_id
    with pytest.raises(InvalidConfig):
        await remove_peer(operator, own, now=NOW)
    assert own in (await look_up(operator)).roster.members


async def test_only_the_operator_invites_and_removes(
    operator: Profile, joiner: Profile, url: str
) -> None:
    await found(operator, url)
    await redeem_invite(joiner, await create_invite(operator, now=NOW))
    with pytest.raises(NotOperator):
        await create_invite(joiner, now=NOW)
    with pytest.raises(NotOperator):
        await remove_peer(joiner, load_or_create_identity(operator).peer_id, now=NOW)


async def test_existing_membership_is_never_overwritten(operator: Profile, url: str) -> None:
    await found(operator, url)
    invite = await create_invite(operator, now=NOW)
    before = files(operator)
    with pytest.raises(AlreadyMember):
        await redeem_invite(operator, invite)
    assert files(operator) == before


@pytest.mark.parametrize(
    "options",
    [
        {"max_uses": 0},
        {"max_uses": 10_001},
        {"expires_hours": 0.0},
        {"expires_hours": float("nan")},
        {"expires_hours": 1e9},
        {"note": "\x1b[2J"},
        {"note": "n" * 201},
        {"backend_url": "ftp://x"},
    ],
)
async def test_option_out_of_range_is_refused_before_anything_is_sent(
    operator: Profile, url: str, service: Backend, options: dict[str, object]
) -> None:
    await found(operator, url)
    swarm_id = SwarmId(bytes.fromhex(operator.load_swarm().swarm_id))
    with pytest.raises(InvalidConfig):
        await create_invite(operator, now=NOW, **options)  # type: ignore[arg-type]
    assert len(service.entries(swarm_id).entries) == FOUNDING


@pytest.mark.parametrize("field", [{"name": ""}, {"name": "n" * 101}, {"model": "\x1b[2J"}])
async def test_unusable_swarm_name_or_model_is_refused(
    operator: Profile, url: str, field: dict[str, str]
) -> None:
    options = {"name": "home", "model": "org/model", "backend_url": url} | field
    with pytest.raises(InvalidConfig):
        await create_swarm(operator, now=NOW, **options)
    assert operator.swarm_ids() == []


async def test_lost_reply_costs_no_second_use(
    operator: Profile, joiner: Profile, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await found(operator, url)
    invite = await create_invite(operator, max_uses=1, now=NOW)
    redeem = MembershipClient.redeem

    async def lose(self: MembershipClient, swarm_id: SwarmId, auth: bytes, join: bytes) -> bytes:
        await redeem(self, swarm_id, auth, join)
        raise BackendUnreachable(url=self.url, problem="connection reset")

    monkeypatch.setattr(MembershipClient, "redeem", lose)
    with pytest.raises(BackendUnreachable):
        await redeem_invite(joiner, invite)
    assert joiner.swarm_ids() == []
    monkeypatch.undo()
    await redeem_invite(joiner, invite)
    assert len((await look_up(joiner)).roster.members) == 2


async def test_of_two_that_enter_a_swarm_at_once_one_is_refused(
    operator: Profile, joiner: Profile, url: str
) -> None:
    await found(operator, url)
    invite = await create_invite(operator, max_uses=2, now=NOW)
    refused: list[ProfileInUse] = []

    async def attempt(entering: Awaitable[object]) -> None:
        try:
            await entering
        except ProfileInUse as error:
            refused.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempt, redeem_invite(joiner, invite))
        nursery.start_soon(attempt, found(joiner, url))
    assert len(refused) == 1
    assert len(joiner.swarm_ids()) == 1
    with operator.lock():  # as a running shard holds it
        await create_invite(operator, now=NOW)


async def test_operator_key_is_kept_before_the_backend_knows_the_swarm(
    operator: Profile, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = MembershipClient.create_swarm
    keys: list[Path] = []

    async def lose(self: MembershipClient, genesis: bytes) -> bytes:
        keys.extend(operator.path.rglob("operator.key"))
        await create(self, genesis)
        raise BackendUnreachable(url=self.url, problem="connection reset")

    monkeypatch.setattr(MembershipClient, "create_swarm", lose)
    with pytest.raises(BackendUnreachable):
        await found(operator, url)
    assert len(keys) == 1
    assert list(operator.path.rglob("operator.key")) == operator.swarm_ids() == []
    monkeypatch.undo()
    await found(operator, url)


async def test_damaged_invite_reaches_no_network(operator: Profile, joiner: Profile) -> None:
    text = Chain().invite().to_text()
    with pytest.raises(InvalidInvite):
        await redeem_invite(joiner, text[:-3])
    assert not joiner.path.exists()
    with pytest.raises(BackendUnreachable):
        await redeem_invite(joiner, unreachable_invite())


def unreachable_invite() -> str:
    made = Chain().invite()
    return Invite(
        token=bytes(32),
        swarm_id=made.swarm_id,
        backend_url="http://127.0.0.1:1",
        epoch=0,
        secret=made.secret,
    ).to_text()


async def test_without_a_swarm_the_profile_says_so(operator: Profile) -> None:
    operator.create_folder()
    with pytest.raises(NoSwarm):
        await create_invite(operator, now=NOW)


Attempt = Callable[[Profile], Awaitable[object]]

ATTEMPTS: dict[str, Attempt] = {
    "invite": lambda profile: create_invite(profile, now=NOW),
    "kick": lambda profile: remove_peer(profile, "12D3KooW" + "x" * 44, now=NOW),
}


def answering(status: int, body: bytes) -> ASGIApp:
    """Return an application that answers every request alike."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    return answer


@pytest.mark.parametrize("attempt", ATTEMPTS)
@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (400, b"{}", BackendRefused),
        (401, b'{"error":{"code":"x","message":"no"}}', BackendRefused),
        (500, b"\xff\xfe", BackendRefused),
        (307, b"", BackendRefused),
        (200, b"garbage", BackendUnreachable),
        (200, b"[" * 100_000, BackendUnreachable),
        (200, b'{"entries":[],"entry":1}', PalsError),
    ],
)
async def test_failing_backend_leaves_every_file_as_it_was(
    operator: Profile, url: str, attempt: str, status: int, body: bytes, error: type[PalsError]
) -> None:
    await found(operator, url)
    with running_app(answering(status, body)) as bad_url:
        path = operator.swarm_folder(operator.swarm_ids()[0]) / "swarm.json"
        path.write_bytes(path.read_bytes().replace(url.encode(), bad_url.encode()))
        before = files(operator)
        with pytest.raises(error):
            await ATTEMPTS[attempt](operator)
        assert files(operator) == before


async def test_failing_backend_makes_no_member(joiner: Profile, operator: Profile) -> None:
    with running_app(answering(200, b'{"entry":"AAAA","entries":["AAAA"]}')) as bad_url:
        made = Chain().invite()
        invite = Invite(
            token=bytes(32),
            swarm_id=made.swarm_id,
            backend_url=bad_url,
            epoch=0,
            secret=made.secret,
        )
        with pytest.raises(InvalidRecord):
            await redeem_invite(joiner, invite.to_text())
        with pytest.raises(BackendUnreachable):
            await found(operator, bad_url)
    assert joiner.swarm_ids() == operator.swarm_ids() == []


async def test_endless_answer_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "MAX_RESPONSE_BYTES", 1000)
    with (
        running_app(answering(200, b"x" * 1_000_000)) as bad_url,
        pytest.raises(BackendUnreachable, match="over 1000 bytes"),
    ):
        await MembershipClient(bad_url).fetch_records(SwarmId(bytes(32)))


async def test_silent_backend_meets_the_deadline() -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    client = MembershipClient(f"http://127.0.0.1:{port}", deadline_s=0.2)
    with pytest.raises(BackendUnreachable):
        await client.fetch_records(SwarmId(bytes(32)))
    await listeners[0].aclose()


async def test_list_of_another_swarm_or_without_the_joiner_is_refused(
    operator: Profile, joiner: Profile, url: str, service: Backend
) -> None:
    await found(operator, url)
    invite = await create_invite(operator, now=NOW)
    genesis_only = service.entries(Invite.parse(invite).swarm_id).entries[:1]
    for lie, error in ((tuple(Chain().entries), InvalidRecord), (genesis_only, RosterRefused)):
        service.lie = lie
        with pytest.raises(error):
            await redeem_invite(joiner, invite)
        assert joiner.swarm_ids() == []
    service.lie = None
    await redeem_invite(joiner, invite)


async def test_first_roster_falls_back_to_the_saved_one(
    operator: Profile, url: str, service: Backend
) -> None:
    await found(operator, url)
    swarm_id = SwarmId(bytes.fromhex(operator.load_swarm().swarm_id))
    await create_invite(operator, now=NOW)
    await look_up(operator)
    service.lie = service.entries(swarm_id).entries[:1]
    for backend_url in (url, "http://127.0.0.1:1"):
        allow_list = AllowList()
        await first_roster(MembershipClient(backend_url), swarm_id, allow_list, operator)
        assert allow_list.roster is not None
        assert allow_list.roster.seq == FOUNDING


async def test_nothing_is_served_without_a_list(operator: Profile, url: str) -> None:
    await found(operator, url)
    swarm_id = SwarmId(bytes.fromhex(operator.load_swarm().swarm_id))
    gone = MembershipClient("http://127.0.0.1:1")
    saved, signer = load_saved(operator, swarm_id), load_operator(operator, operator.load_swarm())
    assert saved is not None
    assert signer is not None
    now = time.time()
    for said_at in (now - MAX_STALE_S - 60, now + MAX_STALE_S + 60):
        word = sign_freshness(signer, saved.roster, at=int(said_at))
        save_roster(operator, swarm_id, saved.held.entries, word)
        with pytest.raises(RosterUnavailable):
            await first_roster(gone, swarm_id, AllowList(), operator)
    word = sign_freshness(signer, saved.roster, at=int(now))
    save_roster(operator, swarm_id, saved.held.entries, word)
    await first_roster(gone, swarm_id, AllowList(), operator)
    operator.roster_path(swarm_id.hex()).unlink()
    with pytest.raises(RosterUnavailable):
        await first_roster(gone, swarm_id, AllowList(), operator)


async def test_damaged_saved_list_is_named(operator: Profile, url: str) -> None:
    await found(operator, url)
    swarm_id = operator.load_swarm().swarm_id
    path = operator.roster_path(swarm_id)
    for damage in (b"", b"garbage", path.read_bytes()[:-1]):
        path.write_bytes(damage)
        with pytest.raises(InvalidConfig) as caught:
            await look_up(operator)
        assert caught.value.fields["source"] == path


async def test_hints_travel_through_the_backend(operator: Profile, url: str) -> None:
    await found(operator, url)
    swarm_id = SwarmId(bytes.fromhex(operator.load_swarm().swarm_id))
    hint = sign_hint(
        load_or_create_identity(operator),
        swarm_id=swarm_id,
        addresses=("/ip4/127.0.0.1/tcp/1",),
        issued_at=int(time.time()),
    )
    client = MembershipClient(url)
    await client.put_hint(swarm_id, hint)
    assert await client.fetch_hints(swarm_id) == (hint,)
