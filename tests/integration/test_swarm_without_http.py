"""A swarm whose backend is in its operator's node: no HTTP server, no other process."""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import pytest
import trio

from pals.backend.database import sqlite_url
from pals.backend.limiter import BackendLimiter
from pals.backend.service import BackendService
from pals.cli.door import Doorway, door_beside
from pals.config import Profile, SwarmSecret
from pals.errors import (
    BackendRefused,
    BackendUnreachable,
    InviteRefused,
    PeerUnreachable,
    PortInUse,
)
from pals.net.administration import open_administrator
from pals.net.backend import Backend
from pals.net.backend_members import PROTOCOL as MEMBERS_PROTOCOL
from pals.net.backends import open_backend
from pals.net.door import knock
from pals.net.enrolment import create_invite, create_swarm, look_up, redeem_invite
from pals.net.framed import read_message, write_message
from pals.net.host import open_host
from pals.net.hosted import load_door_addresses, own_backend_address
from pals.net.invites import find_invite, list_invites, revoke_invite
from pals.net.node import Node, NodeOptions, open_node
from pals.net.redemption import PROTOCOL
from pals.net.removal import remove_peer
from pals.settings import NodeSettings
from pals.swarm.addresses import host_in
from pals.swarm.calls import (
    Failed,
    HintsCall,
    Joined,
    RedeemCall,
    decode_answer,
    decode_redeem_answer,
    encode_message,
)
from pals.swarm.freshness import open_freshness
from pals.swarm.hints import sign_hint
from pals.swarm.identity import Identity, load_or_create_identity
from pals.swarm.invite import Invite
from pals.swarm.records import Join, encode, sign_join
from pals.types import PeerId, SwarmId
from tests.integration.backends import running_backend
from tests.integration.net.harness import until as until_within

pytestmark = pytest.mark.trio

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
until = partial(until_within, deadline_s=20.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosted:
    """An operator whose node runs and keeps the backend."""

    folder: Path
    operator: Profile
    node: Node

    @property
    def swarm_id(self) -> SwarmId:
        return self.node.options.swarm_id

    @property
    def door(self) -> str:
        return load_door_addresses(self.operator)[0]

    async def invite(self, *, made_s_ago: float = 0.0, **options: object) -> str:
        return await create_invite(self.operator, now=time.time() - made_s_ago, **options)

    async def join(self, name: str) -> Profile:
        profile = Profile(self.folder / name)
        await redeem_invite(profile, await self.invite())
        return profile


@pytest.fixture
async def hosted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hosted]:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("somebody speaks HTTP")

    monkeypatch.setattr(httpx, "AsyncClient", refuse)
    async with open_hosted(tmp_path) as running:
        yield running


@asynccontextmanager
async def open_hosted(folder: Path) -> AsyncIterator[Hosted]:
    operator = Profile(folder / "operator")
    address = own_backend_address(operator)
    await create_swarm(operator, name="home", model="m", backend_url=address, now=time.time())
    async with open_node(options_of(operator)) as node:
        yield Hosted(folder=folder, operator=operator, node=node)


def options_of(profile: Profile) -> NodeOptions:
    entry = profile.load_swarm()
    return NodeOptions(
        profile=profile,
        entry=entry,
        secret=SwarmSecret.parse(entry.swarm_secret),
        identity=load_or_create_identity(profile),
        settings=NodeSettings(
            listen=LOOPBACK, redeem_listen=LOOPBACK, upnp=False, poll_interval_s=0.5
        ),
    )


def backend_of(profile: Profile) -> Backend:
    return open_backend(profile.load_swarm().backend_url, profile)


def make_join(invite: Invite, joiner: Identity) -> bytes:
    key = invite.signing_key
    join = Join(
        swarm_id=invite.swarm_id,
        invite=key.public_key,
        peer=joiner.public_key,
        exchange=joiner.exchange_key().public_key().public_bytes_raw(),
    )
    return encode(sign_join(join, invite=key, peer=joiner))


# --- the life of a swarm -------------------------------------------------------------


async def test_a_stranger_joins_by_the_invite_alone_and_is_served_as_a_member(hosted):
    profile = await hosted.join("peer")

    entry = profile.load_swarm()
    assert entry.swarm_secret == hosted.operator.load_swarm().swarm_secret
    assert entry.backend_url in hosted.node.host.addresses()
    membership = await look_up(profile)
    assert (membership.state, len(membership.roster.members)) == ("fresh", 2)
    async with open_node(options_of(profile)) as node:
        await until(lambda: hosted.node.peer_id in node.host.connected_peers())
        await until(lambda: node.peer_id in hosted.node.host.connected_peers())


async def test_a_member_polls_and_leaves_its_address_over_its_own_connection(hosted):
    profile = await hosted.join("peer")
    async with open_node(options_of(profile)) as node:
        backend = backend_of(profile)
        hints = await backend.fetch_hints(hosted.swarm_id)
        assert len(hints) == 2
        fetched = await backend.fetch_records(hosted.swarm_id)
        open_freshness(fetched.freshness, node.allow_list.roster, now_unix=time.time())
        again = await backend.fetch_records(hosted.swarm_id, etag=fetched.etag)
        assert again.entries is None
        assert again.etag == fetched.etag


async def test_a_kicked_member_is_cut_and_nothing_answers_it_any_more(hosted):
    profile, operator = await hosted.join("peer"), hosted.node
    identity = load_or_create_identity(profile)
    # Not a node, which would end by itself: somebody who goes on as if nothing had happened.
    async with open_host(identity, listen=LOOPBACK, allow=lambda _: True) as kicked:
        await kicked.connect(operator.peer_id, operator.host.addresses())
        stream = await kicked.open_stream(operator.peer_id, MEMBERS_PROTOCOL)
        await remove_peer(hosted.operator, identity.peer_id, now=time.time())

        with trio.fail_after(10), pytest.raises(PeerUnreachable):
            await stream.read_exactly(1)
        await until(lambda: identity.peer_id not in operator.host.connected_peers())
        with pytest.raises(PeerUnreachable):
            await kicked.open_stream(operator.peer_id, MEMBERS_PROTOCOL)
        with pytest.raises(BackendUnreachable):
            await backend_of(profile).fetch_records(hosted.swarm_id)


async def test_the_operator_s_commands_work_while_no_node_runs(tmp_path):
    async with open_hosted(tmp_path) as hosted:
        profile = await hosted.join("peer")
    text = await create_invite(hosted.operator, now=time.time())

    assert Invite.parse(text).backend_url == hosted.door
    assert (await look_up(hosted.operator)).state == "fresh"
    with pytest.raises(BackendUnreachable):
        await backend_of(profile).fetch_hints(hosted.swarm_id)
    # As over HTTP, the last verified list stays in force for a while.
    assert (await look_up(profile)).roster.seq > 0


async def test_a_joined_member_may_repeat_a_lost_answer(hosted):
    invite = Invite.parse(await hosted.invite())
    join = make_join(invite, Identity.generate())
    call = RedeemCall(swarm_id=invite.swarm_id, auth=invite.auth, join=join)

    answers = [await ask_door(hosted, call), await ask_door(hosted, call)]

    joined = [decode_redeem_answer(answer) for answer in answers]
    assert all(isinstance(answer, Joined) for answer in joined)
    assert joined[0].entry == joined[1].entry
    assert joined[0].entries == joined[1].entries


async def test_the_door_has_another_identity_than_the_member(hosted):
    assert hosted.node.peer_id not in hosted.door
    assert hosted.node.options.settings.redeem_listen == LOOPBACK
    assert (hosted.operator.path / "redeem.key").stat().st_mode & 0o777 == 0o600


# --- what strangers get --------------------------------------------------------------


async def ask_door(hosted: Hosted, call: RedeemCall | bytes) -> bytes:
    data = call if isinstance(call, bytes) else encode_message(call)
    return await ask_at(hosted.door, PROTOCOL, data)


async def ask_at(address: str, protocol: str, data: bytes) -> bytes:
    async with knock(address, protocol) as stream:
        await write_message(stream, data)
        return await read_message(stream, max_bytes=1 << 20)


async def test_every_bad_invite_and_every_bad_call_is_answered_alike(hosted):
    joiner = Identity.generate()
    spent, revoked = [Invite.parse(await hosted.invite()) for _ in range(2)]
    expired = Invite.parse(await hosted.invite(expires_hours=1.0, made_s_ago=7200))
    assert b"Joined" in await ask_door(hosted, redeem_call(spent, Identity.generate()))
    administrator = await open_administrator(hosted.operator, now=time.time())
    line = find_invite(
        list_invites(administrator, now=time.time()), revoked.signing_key.public_key.hex()
    )
    await revoke_invite(administrator, line, now=time.time())
    unknown = Invite.generate(
        swarm_id=spent.swarm_id, backend_url=hosted.door, epoch=0, secret=spent.secret
    )
    elsewhere = Invite.generate(
        swarm_id=SwarmId(bytes(32)), backend_url=hosted.door, epoch=0, secret=spent.secret
    )
    good = Invite.parse(await hosted.invite())
    foreign = redeem_call(good, joiner)

    answers = {
        name: await ask_door(hosted, call)
        for name, call in {
            "spent": redeem_call(spent, joiner),
            "revoked": redeem_call(revoked, joiner),
            "expired": redeem_call(expired, joiner),
            "unknown invite": redeem_call(unknown, joiner),
            "unknown swarm": redeem_call(elsewhere, joiner),
            "wrong proof": RedeemCall(swarm_id=good.swarm_id, auth=bytes(32), join=foreign.join),
            "damaged join": RedeemCall(
                swarm_id=good.swarm_id, auth=good.auth, join=damage(foreign.join)
            ),
            "no call": b"\x80",
        }.items()
    }

    assert len(set(answers.values())) == 1, answers
    with pytest.raises(InviteRefused):
        await redeem_invite(Profile(hosted.folder / "late"), spent.to_text())


def damage(data: bytes) -> bytes:
    """Return other bytes, whatever the last one is."""
    return data[:-1] + bytes([data[-1] ^ 1])


def redeem_call(invite: Invite, joiner: Identity) -> RedeemCall:
    join = make_join(invite, joiner)
    return RedeemCall(swarm_id=invite.swarm_id, auth=invite.auth, join=join)


async def test_guesses_are_throttled_and_told_nothing_new(hosted):
    guess = Invite.generate(
        swarm_id=hosted.swarm_id,
        backend_url=hosted.door,
        epoch=0,
        secret=SwarmSecret.generate(),
    )
    call = redeem_call(guess, Identity.generate())

    answers = [await ask_door(hosted, call) for _ in range(12)]

    assert [b"refused" in answer for answer in answers[:10]] == [True] * 10
    assert [b"busy" in answer for answer in answers[10:]] == [True] * 2


async def test_a_stranger_reaches_no_protocol_of_the_members_at_either_port(hosted):
    member_address = hosted.node.host.addresses()[0]
    for protocol in (MEMBERS_PROTOCOL, PROTOCOL):
        with pytest.raises(PeerUnreachable):
            await ask_at(member_address, protocol, b"")
    with pytest.raises(PeerUnreachable):
        await ask_at(hosted.door, MEMBERS_PROTOCOL, b"")


# --- what members get ----------------------------------------------------------------


async def call_as_member(profile: Profile, hosted: Hosted, message: bytes) -> bytes:
    """Say ``message`` on the members' protocol and return what is answered."""
    async with open_node(options_of(profile)) as node:
        stream = await node.host.open_stream(hosted.node.peer_id, MEMBERS_PROTOCOL)
        with trio.fail_after(10):
            await stream.write(message)
            return await read_message(stream, max_bytes=1 << 20)


async def test_a_member_learns_nothing_of_other_swarms(hosted):
    profile = await hosted.join("peer")
    call = encode_message(HintsCall(swarm_id=bytes(32)))

    answer = await call_as_member(profile, hosted, len(call).to_bytes(4, "big") + call)

    said = decode_answer(answer)
    assert isinstance(said, Failed)
    assert said.code == "PALS-SWARM-UNKNOWN"


@pytest.mark.parametrize(
    "message",
    [(1 << 31).to_bytes(4, "big"), b"\0\0\0\2\xc1\xc1", b"\0\0\0\1\x80"],
    ids=["too long", "garbage", "no call"],
)
async def test_a_call_that_is_none_ends_its_stream(hosted, message):
    profile = await hosted.join("peer")
    with pytest.raises(PeerUnreachable):
        await call_as_member(profile, hosted, message)


async def test_a_member_cannot_write_what_it_may_not_sign(hosted):
    profile = await hosted.join("peer")
    backend = backend_of(profile)
    identity = load_or_create_identity(profile)
    forged = sign_hint(
        Identity.generate(), swarm_id=hosted.swarm_id, addresses=(), issued_at=int(time.time())
    )
    with pytest.raises(BackendRefused, match="no live member"):
        await backend.put_hint(hosted.swarm_id, forged)
    record = make_join(Invite.parse(await hosted.invite()), identity)
    with pytest.raises(BackendRefused):
        await backend.append(hosted.swarm_id, record, signer=identity)


async def test_a_node_whose_gate_lets_nobody_in_still_asks_the_backend(hosted):
    profile = await hosted.join("peer")
    backend = backend_of(profile)

    class ClosedHost:
        def is_member(self, _: PeerId) -> bool:
            return False

    backend.use_host(ClosedHost())
    assert (await backend.fetch_records(hosted.swarm_id)).entries


async def test_whoever_is_no_member_is_not_asked(hosted):
    profile = await hosted.join("peer")
    called = trio.Event()
    stranger = open_host(Identity.generate(), listen=LOOPBACK, allow=lambda _: True)
    async with stranger as host:
        host.on_connect(lambda _: called.set())
        backend = open_backend(host.addresses()[0], profile)
        with pytest.raises(BackendUnreachable, match="no member"):
            await backend.fetch_hints(hosted.swarm_id)
        assert not called.is_set()


# --- a door beside a service ---------------------------------------------------------


async def test_machines_join_a_service_over_libp2p_and_live_from_the_members(tmp_path):
    service = BackendService(sqlite_url(tmp_path / "backend.db"))
    doorway = Doorway(folder=tmp_path, port=0, announced=("/ip4/203.0.113.7/tcp/8471",))
    operator, peer = Profile(tmp_path / "operator"), Profile(tmp_path / "peer")
    with (
        closing(service),
        running_backend(service) as url,
        door_beside(doorway, service, BackendLimiter(), on_crash=lambda: None) as addresses,
    ):
        await create_swarm(operator, name="home", model="m", backend_url=url, now=time.time())
        here = addresses[1].replace(host_in(addresses[1]), "127.0.0.1")
        text = await create_invite(operator, backend_url=here, now=time.time())
        entry = await redeem_invite(peer, text)

        assert addresses[0].startswith("/ip4/203.0.113.7/tcp/8471/p2p/")
        assert entry.backend_url == here
        with pytest.raises(BackendUnreachable, match="no member"):
            await backend_of(peer).fetch_hints(SwarmId(bytes.fromhex(entry.swarm_id)))
        assert (await look_up(peer)).state == "fresh"


async def test_a_door_whose_port_is_taken_says_so(tmp_path):
    with socket.socket() as taken, closing(BackendService("sqlite://")) as service:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        doorway = Doorway(folder=tmp_path, port=taken.getsockname()[1], announced=())
        door = door_beside(doorway, service, BackendLimiter(), on_crash=lambda: None)
        with pytest.raises(PortInUse), door:
            pass
