"""Connections by the thousand come and go, and leave nothing behind."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import trio

from pals.net._libp2p import MemberConn
from pals.net.host import Host, HostLimits, open_host
from pals.net.mux_stream import ReceiveBudget, StreamState
from pals.net.muxer import MuxedConnection, MuxedStream
from pals.net.noise import NoiseSession
from tests.integration.net.harness import ECHO, LISTEN, ask_echo, echo, identity, open_hosts, until

pytestmark = [pytest.mark.trio, pytest.mark.slow, pytest.mark.timeout(400)]

LIMITS = HostLimits(ping_after_s=1.0, pong_s=1.0, idle_s=600.0, handshake_s=20.0)
AT_ONCE = 20
KILLED_AT_ONCE = 60
RECONNECTS = 2000
KINDS = (MemberConn, MuxedConnection, MuxedStream, NoiseSession, ReceiveBudget, StreamState)
RST_ON_CLOSE = struct.pack("ii", 1, 0)
MORE_MEMORY_BYTES = 16 << 20
DEADLINE_S = 30.0


@dataclass(frozen=True)
class Usage:
    """What this process holds on to; tasks by their names."""

    files: int
    tasks: dict[str, int]
    objects: dict[str, int]
    slots: int


def usage(host: Host) -> Usage:
    gc.collect()
    held = Counter(map(type, gc.get_objects()))
    return Usage(
        files=len(os.listdir("/dev/fd")),
        tasks=Counter(task.name for task in tasks_below(trio.lowlevel.current_root_task())),
        objects={kind.__name__: held[kind] for kind in KINDS},
        slots=host._swarm._inbound_limiter.borrowed_tokens,
    )


def tasks_below(task: trio.lowlevel.Task) -> Iterator[trio.lowlevel.Task]:
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield child
            yield from tasks_below(child)


async def settled(host: Host) -> Usage:
    """Wait until a host that nobody is connected to holds nothing for anybody."""
    await until(lambda: not host.connected_peers(), deadline_s=DEADLINE_S)
    await until(lambda: not any((*usage(host).objects.values(), usage(host).slots)))
    return usage(host)


async def returns_to(before: Usage, host: Host) -> None:
    """Wait until a host holds what it held before; say what is left where it does not."""
    with contextlib.suppress(trio.TooSlowError):
        await until(lambda: usage(host) == before, deadline_s=DEADLINE_S)
    assert usage(host) == before


# --- ways to break a connection, each of a member that no other uses --------------------


@asynccontextmanager
async def connected(host: Host, number: int) -> AsyncIterator[tuple[Host, MuxedConnection]]:
    """Connect a member of its own to ``host``, with an open stream."""
    async with open_host(identity_of(number), listen=LISTEN, allow=lambda _: True) as client:
        await client.connect(host.peer_id, host.addresses(), deadline_s=DEADLINE_S)
        assert await ask_echo(client, host) == b"hello"
        (connection,) = client._swarm.get_connections()
        yield client, connection.muxed_conn


async def leave(host: Host, number: int) -> None:
    async with connected(host, number):
        pass


async def tear_down(host: Host, number: int) -> None:
    """Close the socket so that the other side gets a reset."""
    async with connected(host, number) as (_, muxed):
        sock = muxed.secured_conn._raw.stream.stream.socket
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST_ON_CLOSE)
        muxed.secured_conn.abort()


async def fall_silent(host: Host, number: int) -> None:
    """Neither send nor close anything until the other side has given up."""
    async with connected(host, number) as (client, muxed):
        muxed.pump = lambda *_: None
        await until(lambda: client.peer_id not in host.connected_peers(), deadline_s=DEADLINE_S)


async def send_garbage(host: Host, number: int) -> None:
    """Send bytes that are no record."""
    async with connected(host, number) as (client, muxed):
        muxed.secured_conn._pipe.send_now([os.urandom(1000)])
        await until(lambda: client.peer_id not in host.connected_peers(), deadline_s=DEADLINE_S)


async def send_bad_frames(host: Host, number: int) -> None:
    """Send records of bytes that are no frames."""
    async with connected(host, number) as (client, muxed):
        muxed.secured_conn.send_now([b"\xff" * 100])
        await until(lambda: client.peer_id not in host.connected_peers(), deadline_s=DEADLINE_S)


async def shake_no_hands(host: Host, number: int) -> None:
    """Connect, send something else and go."""
    port = int(host.addresses()[0].split("/")[4])
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    await stream.send_all([b"GET / HTTP/1.1\r\n\r\n", os.urandom(300), b""][number % 3])
    await stream.aclose()


def identity_of(number: int):
    return identity(1 + number % 250)


WAYS = (leave, tear_down, fall_silent, send_garbage, send_bad_frames, shake_no_hands)


async def break_many(host: Host, ways: list[Callable[[Host, int], Awaitable[None]]]) -> None:
    """Break one connection in each of ``ways``, some of them at once."""
    limit = trio.CapacityLimiter(AT_ONCE)

    async def break_one(way, number):
        async with limit:
            await way(host, number)

    async with trio.open_nursery() as nursery:
        for number, way in enumerate(ways):
            nursery.start_soon(break_one, way, number)


async def kill_clients(host: Host, count: int) -> None:
    """Let a process connect ``count`` members, and kill it."""
    target = [str(host.peer_id), host.addresses()[0]]
    command = [sys.executable, "-m", "tests.integration.net.doomed", "2", str(count), *target]
    async with trio.open_nursery() as nursery:
        run = partial(trio.run_process, command, stdout=subprocess.PIPE, check=False)
        process = await nursery.start(run)
        assert await process.stdout.receive_some() == b"connected\n"
        await until(lambda: len(host.connected_peers()) == count, deadline_s=DEADLINE_S)
        process.kill()
    await until(lambda: not host.connected_peers(), deadline_s=DEADLINE_S)


async def test_a_thousand_broken_connections_leave_nothing():
    """Memory is compared after each half: what the first asks the system for stays in use."""
    async with open_host(identity(1), listen=LISTEN, allow=lambda _: True, limits=LIMITS) as host:
        host.handle(ECHO, echo)
        await break_many(host, [*WAYS])
        before = await settled(host)
        memory = []
        for _ in range(2):
            await break_many(host, [*WAYS] * 74)
            await kill_clients(host, KILLED_AT_ONCE)
            await returns_to(before, host)
            memory.append(memory_bytes())

        assert memory[1] - memory[0] < MORE_MEMORY_BYTES


async def test_two_thousand_reconnects_leave_nothing():
    async with open_hosts(2) as (_, (a, b)):

        async def reconnect(times: int) -> None:
            for _ in range(times):
                await a.connect(b.peer_id, b.addresses())
                await a.drop_peer(b.peer_id)

        await reconnect(20)
        before, memory_before = await settled(b), memory_bytes()

        await reconnect(RECONNECTS)

        await returns_to(before, b)
        assert memory_bytes() - memory_before < MORE_MEMORY_BYTES
        await a.connect(b.peer_id, b.addresses())
        assert await ask_echo(a, b) == b"hello"


def memory_bytes() -> int:
    """Return what this process has in memory; where only the peak is known, that."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
