"""What the operator and admins sign, against a real backend, and against one that fails."""

from __future__ import annotations

import time
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import trio
from litestar.types import ASGIApp, Receive, Scope, Send

from pals.backend.database import sqlite_url
from pals.backend.service import BackendService
from pals.config import Profile, SwarmSecret
from pals.errors import (
    AlreadyMember,
    AmbiguousPeer,
    BackendRefused,
    BackendUnreachable,
    InvalidConfig,
    InviteNotKept,
    InviteNotOpen,
    InviteRefused,
    NotOperator,
    OperatorLeaves,
    PalsError,
    ProfileInUse,
    UnknownInvite,
    UnknownPeer,
)
from pals.net.administration import (
    appoint,
    import_key,
    open_administrator,
    operator_pem,
)
from pals.net.enrolment import create_invite, create_swarm, leave_swarm, look_up, redeem_invite
from pals.net.invites import InviteLine, find_invite, kept_text, list_invites, revoke_invite
from pals.net.membership import MembershipClient
from pals.net.moving import move_swarm
from pals.net.removal import remove_peer, rotate
from pals.net.standing import Standing, look_at
from pals.swarm import kept
from pals.swarm.identity import Identity, load_or_create_identity, public_key_of
from pals.swarm.invite import Invite
from pals.swarm.keys import secret_commitment
from pals.swarm.records import Epoch, Remove, decode_entry, decode_record
from pals.types import PeerId, SwarmId, short_id
from tests.integration.backends import running_app, running_backend
from tests.integration.test_membership import answering, files

NOW = time.time()

pytestmark = pytest.mark.trio


@pytest.fixture(scope="module")
def database_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return sqlite_url(tmp_path_factory.mktemp("backend") / "backend.db")


@pytest.fixture(scope="module")
def service(database_url: str) -> Iterator[BackendService]:
    service = BackendService(database_url)
    yield service
    service.close()


@pytest.fixture(scope="module")
def url(service: BackendService) -> Iterator[str]:
    with running_backend(service) as url:
        yield url


@pytest.fixture
def operator(tmp_path: Path) -> Profile:
    return Profile(tmp_path / "operator")


@pytest.fixture
async def joiner(operator: Profile, url: str, tmp_path: Path) -> Profile:
    """Return a member of the operator's swarm."""
    await found(operator, url)
    return await joined(operator, tmp_path / "joiner")


async def found(profile: Profile, url: str, name: str = "home") -> None:
    await create_swarm(profile, name=name, model="org/model", backend_url=url, now=NOW)


async def joined(operator: Profile, folder: Path) -> Profile:
    profile = Profile(folder)
    await redeem_invite(profile, await create_invite(operator, now=NOW))
    return profile


def peer_of(profile: Profile) -> PeerId:
    return load_or_create_identity(profile).peer_id


def swarm_of(profile: Profile) -> SwarmId:
    return SwarmId(bytes.fromhex(profile.load_swarm().swarm_id))


def records_of(service: BackendService, swarm_id: SwarmId) -> list[object]:
    entries = service.entries(swarm_id).entries
    return [decode_record(decode_entry(data).record) for data in entries]


async def lines_of(profile: Profile, now: float = NOW) -> list[InviteLine]:
    return list_invites(await open_administrator(profile, now=now), now=now)


async def assert_secret_is_the_lists(profile: Profile) -> None:
    """Check that the profile holds the secret that the newest list commits to."""
    membership = await look_up(profile)
    entry, roster = profile.load_swarm(), membership.roster
    secret = SwarmSecret.parse(entry.swarm_secret).reveal()
    assert entry.epoch == roster.epoch
    assert secret_commitment(entry.epoch, secret) == roster.commitment


class Failing:
    """Makes some calls of `MembershipClient.append` fail, before or after they take effect."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._append = MembershipClient.append
        self._patch = monkeypatch

    def at(self, kind: type, *, is_stored: bool) -> None:
        append = self._append

        async def fail(
            client: MembershipClient, swarm_id: SwarmId, record: bytes, **options: object
        ) -> bytes:
            is_meant = isinstance(decode_record(record), kind)
            if is_stored or not is_meant:
                stored = await append(client, swarm_id, record, **options)  # type: ignore[arg-type]
                if not is_meant:
                    return stored
            raise BackendUnreachable(url=client.url, problem="connection reset")

        self._patch.setattr(MembershipClient, "append", fail)

    def no_more(self) -> None:
        self._patch.setattr(MembershipClient, "append", self._append)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    return Failing(monkeypatch)


# --- several swarms ------------------------------------------------------------------


async def test_one_profile_belongs_to_several_swarms(
    operator: Profile, joiner: Profile, tmp_path: Path, url: str
) -> None:
    other = Profile(tmp_path / "other")
    await found(other, url, "office")
    await redeem_invite(joiner, await create_invite(other, now=NOW))

    assert sorted(entry.name for entry in joiner.load_swarms()) == ["home", "office"]
    for name in ("home", "office"):
        membership = await look_up(joiner, name)
        assert (membership.entry.name, membership.state) == (name, "fresh")
        assert peer_of(joiner) in membership.roster.members


async def test_operator_of_two_swarms_administers_each(operator: Profile, url: str) -> None:
    await found(operator, url)
    await found(operator, url, "office")

    invite = Invite.parse(await create_invite(operator, now=NOW, swarm="office"))

    assert invite.swarm_id.hex() == operator.load_swarm("office").swarm_id
    assert await lines_of_swarm(operator, "home") == []


async def lines_of_swarm(profile: Profile, swarm: str) -> list[InviteLine]:
    return list_invites(await open_administrator(profile, swarm, now=NOW), now=NOW)


async def test_the_backend_is_appointed_with_the_swarm(
    operator: Profile, url: str, service: BackendService
) -> None:
    await found(operator, url)
    roster = (await look_up(operator)).roster
    assert roster.authorities[await MembershipClient(url).fetch_key()] == "backend"


async def test_backend_without_a_key_makes_no_swarm_and_is_explained(operator: Profile) -> None:
    with (
        running_app(answering(404, b"{}")) as bad_url,
        pytest.raises(InvalidConfig, match="does not say with which key"),
    ):
        await found(operator, bad_url)
    assert operator.swarm_ids() == []


# --- invites -------------------------------------------------------------------------


async def test_invite_is_sent_again_until_it_is_spent(
    operator: Profile, url: str, tmp_path: Path
) -> None:
    await found(operator, url)
    text = await create_invite(operator, note="for Ben", now=NOW)
    (line,) = await lines_of(operator)
    administrator = await open_administrator(operator, now=NOW)
    assert (line.status, line.use.certificate.note, line.is_kept) == ("open", "for Ben", True)
    assert kept_text(administrator, line).to_text() == text

    await redeem_invite(Profile(tmp_path / "joiner"), text)

    (line,) = await lines_of(operator)
    assert (line.status, line.is_kept) == ("spent", False)
    with pytest.raises(InviteNotOpen):
        kept_text(administrator, line)
    assert text not in str(files(operator).values())


async def test_kept_invites_are_private_files(operator: Profile, url: str) -> None:
    await found(operator, url)
    await create_invite(operator, now=NOW)
    (path,) = operator.path.rglob("*.invite")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


async def test_revoked_invite_lets_nobody_in_and_its_text_is_gone(
    operator: Profile, url: str, tmp_path: Path
) -> None:
    await found(operator, url)
    text = await create_invite(operator, max_uses=5, now=NOW)
    administrator = await open_administrator(operator, now=NOW)
    (line,) = list_invites(administrator, now=NOW)

    await revoke_invite(administrator, line, now=NOW)

    with pytest.raises(InviteRefused):
        await redeem_invite(Profile(tmp_path / "late"), text)
    (line,) = await lines_of(operator)
    assert (line.status, line.is_kept) == ("revoked", False)
    with pytest.raises(InviteNotOpen):
        await revoke_invite(await open_administrator(operator, now=NOW), line, now=NOW)


async def test_expired_invite_says_so(operator: Profile, url: str) -> None:
    await found(operator, url)
    await create_invite(operator, expires_hours=1, now=NOW)
    assert [line.status for line in await lines_of(operator, NOW + 3599)] == ["open"]
    assert [line.status for line in await lines_of(operator, NOW + 3601)] == ["expired"]
    assert list(operator.path.rglob("*.invite")) == []


async def test_invite_of_a_kicked_member_is_closed(operator: Profile, joiner: Profile) -> None:
    await remove_peer(operator, peer_of(joiner), now=NOW)
    assert [line.status for line in await lines_of(operator)] == ["closed"]


async def test_invite_made_elsewhere_is_not_sent_again_from_here(
    operator: Profile, joiner: Profile
) -> None:
    await appoint(await open_administrator(operator, now=NOW), peer_of(joiner), "admin", now=NOW)
    await create_invite(joiner, now=NOW)
    line = (await lines_of(operator))[-1]
    with pytest.raises(InviteNotKept):
        kept_text(await open_administrator(operator, now=NOW), line)


async def test_refused_certificate_leaves_no_text(
    operator: Profile, url: str, failing: Failing
) -> None:
    await found(operator, url)
    failing.at(object, is_stored=False)
    with pytest.raises(BackendUnreachable):
        await create_invite(operator, now=NOW)
    assert list(operator.path.rglob("*.invite")) == []


async def test_invite_is_found_by_the_start_of_its_id(operator: Profile, url: str) -> None:
    await found(operator, url)
    await create_invite(operator, now=NOW)
    (line,) = await lines_of(operator)
    key = line.key.hex()
    for wanted in (key, key[:8], key[:4].upper()):
        assert find_invite([line], wanted) is line
    nearly = key[:7] + ("0" if key[7] != "0" else "1")
    with pytest.raises(UnknownInvite) as caught:
        find_invite([line], nearly)
    assert caught.value.hint == f"did you mean `{key[:8]}`?"
    for wanted in ("", key[:3], "zzzzzzzz"):
        with pytest.raises(UnknownInvite):
            find_invite([line], wanted)
    twin = replace(line, key=line.key[:4] + bytes(28))
    with pytest.raises(UnknownInvite) as caught:
        find_invite([line, twin], key[:4])
    assert "write more" in caught.value.hint


class Recorder:
    """An application that notes all that it is asked, and passes it on."""

    def __init__(self) -> None:
        self.heard = bytearray()

    def wrap(self, app: ASGIApp) -> ASGIApp:
        async def recording(scope: Scope, receive: Receive, send: Send) -> None:
            async def listen() -> Any:
                message = await receive()
                self.heard.extend(cast("bytes", message.get("body", b"")))
                return message

            self.heard.extend(
                repr((scope["path"], scope["query_string"], scope["headers"])).encode()
            )
            await app(scope, listen, send)

        return recording


async def test_the_receipt_of_joining_is_in_no_request(
    operator: Profile, database_url: str, tmp_path: Path
) -> None:
    service, recorder = BackendService(database_url), Recorder()
    with running_backend(service, wrap=recorder.wrap) as url:
        await found(operator, url)
        first = await joined(operator, tmp_path / "first")
        second = await joined(operator, tmp_path / "second")
        client, swarm_id = MembershipClient(url), swarm_of(operator)
        fetched = await client.fetch_records(swarm_id)
        await client.fetch_records(swarm_id, etag=fetched.etag)  # names the newest entry
        receipts = [p.load_swarm().peer_credential for p in (operator, first, second)]
        for profile in (operator, first, second):
            await look_up(profile)
        await remove_peer(operator, peer_of(second), now=NOW)
        await leave_swarm(first, first.load_swarm())
    service.close()

    assert fetched.etag.strip('"').encode() in recorder.heard
    for receipt in receipts:
        raw = bytes.fromhex(receipt)
        for form in (receipt.encode(), raw, b64encode(raw), urlsafe_b64encode(raw)):
            assert form.rstrip(b"=") not in recorder.heard


# --- kick and rotate -----------------------------------------------------------------


async def test_kick_removes_and_gives_the_swarm_a_new_secret(
    operator: Profile, joiner: Profile, service: BackendService
) -> None:
    before = operator.load_swarm()

    removal = await remove_peer(operator, peer_of(joiner), now=NOW)

    assert (removal.is_listed, removal.is_rotated, removal.problem) == (True, True, None)
    after = operator.load_swarm()
    assert after == removal.entry
    assert after.epoch == before.epoch + 1
    assert after.swarm_secret != before.swarm_secret
    assert after.peer_credential == before.peer_credential
    await assert_secret_is_the_lists(operator)
    kinds = [type(record) for record in records_of(service, swarm_of(operator))]
    assert kinds[-2:] == [Remove, Epoch]
    assert not list(operator.path.rglob("next.json"))


async def test_kept_invites_get_the_new_secret(
    operator: Profile, joiner: Profile, tmp_path: Path
) -> None:
    old = Invite.parse(await create_invite(operator, now=NOW))
    await remove_peer(operator, peer_of(joiner), now=NOW)
    line = (await lines_of(operator))[-1]

    invite = kept_text(await open_administrator(operator, now=NOW), line)

    assert invite.auth == old.auth
    assert invite.epoch == 1
    assert invite.secret.reveal() != old.secret.reveal()
    late = Profile(tmp_path / "late")
    await redeem_invite(late, invite.to_text())
    await assert_secret_is_the_lists(late)


@pytest.mark.parametrize("part", [lambda peer: peer, short_id, lambda peer: peer[:20]])
async def test_peer_is_named_by_a_piece_of_its_id(
    operator: Profile, joiner: Profile, part: object
) -> None:
    assert callable(part)
    removal = await remove_peer(operator, part(peer_of(joiner)), now=NOW)
    assert removal.peer == peer_of(joiner)


async def test_unknown_or_ambiguous_peer_changes_nothing(
    operator: Profile, joiner: Profile, service: BackendService
) -> None:
    before = len(records_of(service, swarm_of(operator)))
    peer = peer_of(joiner)
    with pytest.raises(AmbiguousPeer):
        await remove_peer(operator, "12D3KooW", now=NOW)
    with pytest.raises(UnknownPeer) as caught:
        await remove_peer(operator, peer[:-1] + ("x" if peer[-1] != "x" else "y"), now=NOW)
    assert caught.value.hint == f"did you mean `{peer}`?"
    for nobody in ("", "abc", peer[-3:]):
        with pytest.raises(UnknownPeer):
            await remove_peer(operator, nobody, now=NOW)
    with pytest.raises(InvalidConfig, match="this machine"):
        await remove_peer(operator, peer_of(operator), now=NOW)
    assert len(records_of(service, swarm_of(operator))) == before


async def test_kick_that_ended_between_its_records_is_ended_by_another(
    operator: Profile, joiner: Profile, failing: Failing
) -> None:
    failing.at(Epoch, is_stored=False)
    removal = await remove_peer(operator, peer_of(joiner), now=NOW)
    assert (removal.is_listed, removal.is_rotated) == (True, False)
    assert isinstance(removal.problem, BackendUnreachable)
    assert operator.load_swarm().epoch == 0
    failing.no_more()

    removal = await remove_peer(operator, short_id(peer_of(joiner)), now=NOW)

    assert removal.is_rotated
    await assert_secret_is_the_lists(operator)
    with pytest.raises(UnknownPeer):
        await remove_peer(operator, peer_of(joiner), now=NOW)


@pytest.mark.parametrize("is_stored", [True, False])
async def test_rotation_ends_what_a_lost_answer_left(
    operator: Profile, joiner: Profile, failing: Failing, *, is_stored: bool
) -> None:
    failing.at(Epoch, is_stored=is_stored)
    await remove_peer(operator, peer_of(joiner), now=NOW)
    assert operator.load_swarm().epoch == 0
    failing.no_more()

    await rotate(operator, now=NOW)

    await assert_secret_is_the_lists(operator)
    assert not list(operator.path.rglob("next.json"))


async def test_secret_of_a_lost_answer_is_used_by_the_next_command(
    operator: Profile, joiner: Profile, failing: Failing
) -> None:
    failing.at(Epoch, is_stored=True)
    await remove_peer(operator, peer_of(joiner), now=NOW)
    failing.no_more()

    invite = Invite.parse(await create_invite(operator, now=NOW))

    assert invite.epoch == 1
    await assert_secret_is_the_lists(operator)


async def test_secret_that_another_admin_outran_is_forgotten(
    operator: Profile, joiner: Profile, failing: Failing
) -> None:
    await appoint(await open_administrator(operator, now=NOW), peer_of(joiner), "admin", now=NOW)
    failing.at(Epoch, is_stored=False)
    with pytest.raises(BackendUnreachable):
        await rotate(operator, now=NOW)
    failing.no_more()
    await rotate(joiner, now=NOW)

    await lines_of(operator)

    assert operator.load_swarm().epoch == 0  # a member has to give it the admin's secret
    assert not list(operator.path.rglob("next.json"))


async def test_kick_without_the_backend_is_kept_and_made_good_later(
    operator: Profile, joiner: Profile, failing: Failing, service: BackendService
) -> None:
    await look_up(operator)
    entry = operator.load_swarm()
    operator.save_swarm(msgspec.structs.replace(entry, backend_url="http://127.0.0.1:1"))
    removals = [await remove_peer(operator, peer_of(joiner), now=NOW)]
    operator.save_swarm(entry)
    failing.at(object, is_stored=False)
    removals.append(await remove_peer(operator, peer_of(joiner), now=NOW))
    for removal in removals:
        assert (removal.is_listed, removal.is_rotated) == (False, False)
        assert isinstance(removal.problem, BackendUnreachable)
    (waiting,) = kept.load_removals(operator, swarm_of(operator))
    record = decode_record(waiting)
    assert isinstance(record, Remove)
    assert record.peer == public_key_of(peer_of(joiner))
    failing.no_more()

    removal = await remove_peer(operator, peer_of(joiner), now=NOW)

    assert removal.is_rotated
    assert kept.load_removals(operator, swarm_of(operator)) == ()
    kinds = [type(record) for record in records_of(service, swarm_of(operator))]
    assert kinds.count(Remove) == 1
    await assert_secret_is_the_lists(operator)


async def test_rotation_has_the_backend_take_kept_removals_first(
    operator: Profile, joiner: Profile, failing: Failing
) -> None:
    failing.at(object, is_stored=False)
    await remove_peer(operator, peer_of(joiner), now=NOW)
    failing.no_more()

    await rotate(operator, now=NOW)

    membership = await look_up(operator)
    assert peer_of(joiner) not in membership.roster.members
    await assert_secret_is_the_lists(operator)


async def test_of_two_rotations_at_once_one_is_refused(operator: Profile, url: str) -> None:
    await found(operator, url)
    refused: list[ProfileInUse] = []

    async def attempt() -> None:
        try:
            await rotate(operator, now=NOW)
        except ProfileInUse as error:
            refused.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempt)
        nursery.start_soon(attempt)
    assert len(refused) == 1
    await assert_secret_is_the_lists(operator)


# --- roles ---------------------------------------------------------------------------


async def test_admin_invites_kicks_and_rotates_until_that_is_ended(
    operator: Profile, joiner: Profile, tmp_path: Path
) -> None:
    with pytest.raises(NotOperator):
        await create_invite(joiner, now=NOW)
    named = await open_administrator(operator, now=NOW)
    await appoint(named, short_id(peer_of(joiner)), "admin", now=NOW)

    third = await joined(joiner, tmp_path / "third")
    assert (await remove_peer(joiner, peer_of(third), now=NOW)).is_rotated
    with pytest.raises(NotOperator):
        await appoint(
            await open_administrator(joiner, now=NOW), peer_of(operator), "admin", now=NOW
        )

    await appoint(await open_administrator(operator, now=NOW), peer_of(joiner), "none", now=NOW)
    with pytest.raises(NotOperator):
        await rotate(joiner, now=NOW)


async def test_exported_key_makes_another_member_an_operator(
    operator: Profile, joiner: Profile, url: str, tmp_path: Path
) -> None:
    pem = operator_pem(operator, operator.load_swarm())
    import_key(joiner, joiner.load_swarm(), pem)
    assert (await look_at(joiner, joiner.load_swarm())).part == "operator"
    assert operator_pem(joiner, joiner.load_swarm()) == pem
    await create_invite(joiner, now=NOW)
    with pytest.raises(InvalidConfig, match="already"):
        import_key(joiner, joiner.load_swarm(), pem)


async def test_key_of_another_swarm_or_none_is_refused(
    operator: Profile, joiner: Profile, url: str, tmp_path: Path
) -> None:
    stranger = Profile(tmp_path / "stranger")
    await found(stranger, url)
    with pytest.raises(NotOperator):
        operator_pem(joiner, joiner.load_swarm())
    before = files(joiner)
    for pem in (b"", b"garbage", operator_pem(stranger, stranger.load_swarm())):
        with pytest.raises(InvalidConfig):
            import_key(joiner, joiner.load_swarm(), pem)
    assert files(joiner) == before


# --- a backend that moves ------------------------------------------------------------


async def test_members_follow_a_backend_whose_key_the_operator_names(
    operator: Profile, joiner: Profile, database_url: str, url: str
) -> None:
    old = await MembershipClient(url).fetch_key()
    moved = BackendService(database_url, signer=Identity.generate())
    with running_backend(moved) as new_url:
        new = await MembershipClient(new_url).fetch_key()
        assert not await move_swarm(joiner, joiner.load_swarm(), new_url, now=NOW)

        assert await move_swarm(operator, operator.load_swarm(), new_url, now=NOW)

        assert await move_swarm(joiner, joiner.load_swarm(), new_url, now=NOW)
        for profile in (operator, joiner):
            assert profile.load_swarm().backend_url == new_url
            membership = await look_up(profile)
            assert membership.state == "fresh"
            assert membership.roster.authorities.get(new) == "backend"
            assert old not in membership.roster.authorities
    moved.close()


async def test_move_to_where_the_swarm_is_not_changes_nothing(
    operator: Profile, joiner: Profile, tmp_path: Path
) -> None:
    empty = BackendService(sqlite_url(tmp_path / "empty.db"))
    before = contents(operator)
    with running_backend(empty) as elsewhere:
        for address in (elsewhere, "http://127.0.0.1:1", "ftp://x"):
            with pytest.raises((BackendRefused, BackendUnreachable, InvalidConfig)):
                await move_swarm(operator, operator.load_swarm(), address, now=NOW)
    empty.close()
    assert contents(operator) == before


# --- leaving -------------------------------------------------------------------------


async def test_member_that_leaves_is_on_no_list_and_may_come_again(
    operator: Profile, joiner: Profile
) -> None:
    entry = joiner.load_swarm()

    assert await leave_swarm(joiner, entry)

    assert joiner.swarm_ids() == []
    assert entry.swarm_secret not in str(files(joiner))
    assert peer_of(joiner) not in (await look_up(operator)).roster.members
    standing = await look_at(operator, operator.load_swarm())
    assert "pals swarm rotate" in standing.next_step
    await redeem_invite(joiner, await create_invite(operator, now=NOW))
    assert peer_of(joiner) in (await look_up(operator)).roster.members


async def test_removed_member_leaves_and_comes_again_by_a_new_invite(
    operator: Profile, joiner: Profile
) -> None:
    await remove_peer(operator, peer_of(joiner), now=NOW)
    invite = await create_invite(operator, now=NOW)
    assert (await look_at(joiner, joiner.load_swarm())).part == "removed"
    with pytest.raises(AlreadyMember):
        await redeem_invite(joiner, invite)

    assert await leave_swarm(joiner, joiner.load_swarm())

    await redeem_invite(joiner, invite)
    await assert_secret_is_the_lists(joiner)


async def test_operator_leaves_only_a_swarm_that_has_an_admin(
    operator: Profile, joiner: Profile
) -> None:
    before = files(operator)
    with pytest.raises(OperatorLeaves):
        await leave_swarm(operator, operator.load_swarm())
    assert files(operator).items() >= before.items()
    await appoint(await open_administrator(operator, now=NOW), peer_of(joiner), "admin", now=NOW)

    assert await leave_swarm(operator, operator.load_swarm())

    assert operator.swarm_ids() == []
    assert (await look_up(joiner)).roster.members == {peer_of(joiner)}


async def test_operator_may_leave_by_force(operator: Profile, url: str) -> None:
    await found(operator, url)
    assert await leave_swarm(operator, operator.load_swarm(), is_forced=True)
    assert operator.swarm_ids() == []


async def test_leaving_without_the_backend_takes_force(joiner: Profile, failing: Failing) -> None:
    failing.at(object, is_stored=False)
    before = files(joiner)
    with pytest.raises(BackendUnreachable):
        await leave_swarm(joiner, joiner.load_swarm())
    assert files(joiner).items() >= before.items()
    assert not await leave_swarm(joiner, joiner.load_swarm(), is_forced=True)
    assert joiner.swarm_ids() == []


async def test_nobody_leaves_while_a_server_runs(joiner: Profile) -> None:
    with joiner.lock(), pytest.raises(ProfileInUse):
        await leave_swarm(joiner, joiner.load_swarm())
    assert len(joiner.swarm_ids()) == 1


# --- a backend that fails ------------------------------------------------------------


ANSWERS = (
    (400, b"{}"),
    (401, b'{"error":{"code":"x","message":"no"}}'),
    (500, b"\xff\xfe"),
    (200, b"garbage"),
    (200, b'{"entries":[],"entry":1,"key":"AAAA"}'),
)

COMMANDS: dict[str, Callable[[Profile], Awaitable[object]]] = {
    "invite": lambda profile: create_invite(profile, now=NOW),
    "rotate": lambda profile: rotate(profile, now=NOW),
    "kick": lambda profile: remove_peer(profile, "nobody at all", now=NOW),
    "leave": lambda profile: leave_swarm(profile, profile.load_swarm()),
    "open": lambda profile: open_administrator(profile, now=NOW),
}


async def test_refused_session_leaves_every_file_as_it_was(
    operator: Profile, joiner: Profile
) -> None:
    entry = operator.load_swarm()
    for status, body in ANSWERS:
        with running_app(answering(status, body)) as bad_url:
            operator.save_swarm(msgspec.structs.replace(entry, backend_url=bad_url))
            before = contents(operator)
            for command in COMMANDS.values():
                with pytest.raises(PalsError):
                    await command(operator)
            assert contents(operator) == before


async def test_refused_login_leaves_another_swarm_as_it_was(
    joiner: Profile, url: str, tmp_path: Path
) -> None:
    other = Profile(tmp_path / "other")
    await found(other, url, "office")
    before = contents(joiner)
    for status, body in ANSWERS:
        with running_app(answering(status, body)) as bad_url:
            invite = await create_invite(other, backend_url=bad_url, now=NOW)
            with pytest.raises((BackendRefused, BackendUnreachable)):
                await redeem_invite(joiner, invite)
        assert contents(joiner) == before


def contents(profile: Profile) -> dict[Path, bytes]:
    """Return every file but the locks, which hold the number of the last process."""
    return {path: data for path, data in files(profile).items() if path.suffix != ".lock"}


# --- where a profile stands ----------------------------------------------------------


async def stands(profile: Profile) -> Standing:
    return await look_at(profile, profile.load_swarm())


async def test_standing_says_what_to_do_next(
    operator: Profile, url: str, tmp_path: Path, failing: Failing
) -> None:
    await found(operator, url)
    alone = await stands(operator)
    assert (alone.part, alone.state, alone.alarms) == ("operator", "fresh", ())
    assert "pals invite create" in alone.next_step
    joiner = await joined(operator, tmp_path / "joiner")
    assert (await stands(operator)).next_step == ""
    assert (await stands(joiner)).part == "member"
    await rotate(operator, now=NOW)
    assert "newer secret" in (await stands(joiner)).next_step
    failing.at(object, is_stored=False)
    await remove_peer(operator, peer_of(joiner), now=NOW)
    assert "pals swarm rotate" in (await stands(operator)).next_step


async def test_standing_without_the_backend_is_that_of_the_saved_list(
    operator: Profile, joiner: Profile
) -> None:
    entry = msgspec.structs.replace(operator.load_swarm(), backend_url="http://127.0.0.1:1")
    operator.save_swarm(entry)
    standing = await stands(operator)
    assert standing.roster is not None
    assert standing.alarms == ()
    assert "check the backend" in standing.next_step
    operator.roster_path(entry.swarm_id).unlink()
    standing = await stands(operator)
    assert (standing.state, standing.roster, standing.age_s) == ("none", None, None)


async def test_another_list_than_the_verified_one_is_an_alarm(
    operator: Profile, joiner: Profile, service: BackendService, monkeypatch: pytest.MonkeyPatch
) -> None:
    await look_up(operator)
    entries = service.entries(swarm_of(operator))
    older = type(entries)(entries=entries.entries[:2], etag="older")
    monkeypatch.setattr(service, "entries", lambda *_: older)
    (alarm,) = (await stands(operator)).alarms
    assert "refused" in alarm
