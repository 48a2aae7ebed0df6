"""Links whose bytes are changed on the way, or whose other side speaks another version."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import trio

from pals import config
from pals.errors import InvalidFrame, PalsError, WireVersionMismatch
from pals.net import handshake as handshake_module
from pals.net import links as links_module
from pals.net import live_link as live_link_module
from pals.net.handshake import LinkSecrets
from pals.net.host import Host
from pals.net.links import Arrival, Links
from pals.net.wire import HEADER_BYTES, FrameShape, Lane
from pals.swarm.keys import Role
from pals.types import PeerId, SwarmId
from tests.integration.net.harness import open_hosts, until
from tests.integration.swarm import (
    ask,
    make_swarm,
    open_client,
    request,
    start_chain,
)
from tests.integration.wiretap import StreamEnd, Wiretap, flip

pytestmark = [pytest.mark.trio, pytest.mark.timeout(180)]

LAYERS = ("0:1", "1:2", "2:3")
WANTED = request((5, 9, 200, 31), count=8)
CORRUPT_FRAME = 3
CORRUPTIONS = {HEADER_BYTES: "does not open", 9: "swarm is "}
"""Which byte of the frame is changed, and what its receiver says of it."""


@dataclass(slots=True)
class FlipOneBit:
    """Changes one bit of one frame: of the third on a decode lane from now on."""

    sender: PeerId
    receiver: PeerId
    at: int
    seen: int = 0

    def __call__(self, end: StreamEnd, data: bytes) -> bytes:
        is_theirs = (end.local, end.remote) == (self.sender, self.receiver)
        if not is_theirs or data[:4] != b"PALS" or data[5] != Lane.DECODE:
            return data
        self.seen += 1
        return flip(data, 8 * self.at) if self.seen == CORRUPT_FRAME else data


@pytest.fixture
def tap(monkeypatch: pytest.MonkeyPatch, shared_cache: Path) -> Wiretap:
    monkeypatch.setenv(config.CACHE_DIR_VARIABLE, str(shared_cache))
    made = Wiretap()
    made.install(monkeypatch)
    return made


async def test_a_corrupted_frame_ends_its_link_and_the_session_goes_on_over_another(
    tmp_path: Path, nursery: trio.Nursery, tap: Wiretap, caplog: pytest.LogCaptureFixture
) -> None:
    async with make_swarm(tmp_path, num_layers=len(LAYERS)) as swarm:
        shards = await start_chain(nursery, swarm, *LAYERS, make_ephemeral=tap.make_ephemeral)
        _, middle, tail = (shard.node for shard in shards)
        async with open_client(swarm, make_ephemeral=tap.make_ephemeral) as client:
            untouched = await (await ask(client, WANTED)).all_tokens()
            for at, problem in CORRUPTIONS.items():
                caplog.clear()
                links_before = tap.links_opened()
                tap.tamper = FlipOneBit(middle.peer_id, tail.peer_id, at=at)
                assert await (await ask(client, WANTED)).all_tokens() == untouched
                (refused,) = logged_errors(caplog, InvalidFrame)
                assert f"frame from peer {middle.peer_id} refused" in str(refused)
                assert problem in str(refused)
                (fresh,) = [end for end in tap.links_opened() if end not in links_before]
                assert (fresh.local, fresh.remote) == (middle.peer_id, tail.peer_id)
        nursery.cancel_scope.cancel()


def logged_errors(caplog: pytest.LogCaptureFixture, kind: type[PalsError]) -> list[PalsError]:
    """Return the errors of one kind that the links have logged."""
    names = {links_module.__name__, live_link_module.__name__}
    records = [record for record in caplog.records if record.name in names]
    arguments = [a for record in records if isinstance(record.args, tuple) for a in record.args]
    return [argument for argument in arguments if isinstance(argument, kind)]


class NoEvents:
    """The events of links that never come up."""

    def accepted(self, peer: PeerId, lane: Lane) -> tuple[FrameShape, ...]:
        return ()

    def on_frame(self, peer: PeerId, arrival: Arrival) -> None:
        raise AssertionError("no frame may come")

    def on_link_lost(self, peer: PeerId, problem: str) -> None:
        raise AssertionError("there was no link")


@pytest.mark.parametrize("newer", ["initiator", "responder"])
async def test_another_wire_version_is_named_on_both_sides(
    newer: Role,
    nursery: trio.Nursery,
    tap: Wiretap,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with open_hosts(2) as (_, (initiator, responder)):
        make_newer(monkeypatch, initiator if newer == "initiator" else responder)
        initiators, responders = (
            Links(host, secrets_of(host), NoEvents(), make_ephemeral=tap.make_ephemeral)
            for host in (initiator, responder)
        )
        await nursery.start(initiators.run)
        await nursery.start(responders.run)
        with pytest.raises(WireVersionMismatch) as dialled:
            await initiators.ensure(responder.peer_id, responder.addresses())
        await until(lambda: bool(logged_errors(caplog, WireVersionMismatch)))
        linked = initiators.linked_peers() | responders.linked_peers()
        nursery.cancel_scope.cancel()

    (answered,) = logged_errors(caplog, WireVersionMismatch)
    ours, theirs = (4, 3) if newer == "initiator" else (3, 4)
    mismatch = "peer {} speaks wire version {}, this machine speaks {}"
    assert str(dialled.value) == mismatch.format(responder.peer_id, theirs, ours)
    assert str(answered) == mismatch.format(initiator.peer_id, ours, theirs)
    assert not linked
    (stream,) = tap.streams()
    assert stream.from_acceptor == b"PALS" + bytes([theirs, 1])  # no key and no confirmation


def secrets_of(host: Host) -> LinkSecrets:
    return LinkSecrets(
        swarm_id=SwarmId(bytes(32)), epoch=0, epoch_prk=bytes(32), local=host.peer_id
    )


def make_newer(monkeypatch: pytest.MonkeyPatch, host: Host) -> None:
    """Let one host of this process speak wire version 4."""
    newer = second_copy_of(handshake_module.__name__)
    newer.WIRE_VERSION = 4

    def make_handshake(role: Role, secrets: LinkSecrets, *args: PeerId, **kwargs: object) -> object:
        module = newer if secrets.local == host.peer_id else handshake_module
        return module.Handshake(role, secrets, *args, **kwargs)

    monkeypatch.setattr(links_module, "Handshake", make_handshake)


def second_copy_of(name: str) -> ModuleType:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
