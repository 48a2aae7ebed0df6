"""What a running process says of itself: to `pals doctor`, `pals peers list`, `pals status`.

A running member answers on a Unix socket in its profile folder, which only its user may
enter: one connection, one line that names a report, one report in JSON.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import msgspec
import trio

from pals.errors import InvalidConfig, PalsError, PeerUnreachable
from pals.net.announce import Announcement
from pals.net.nat.reachability import Reach
from pals.swarm.allowlist import AllowState
from pals.types import PeerId

if TYPE_CHECKING:
    from pals.net.node import Node

_log = logging.getLogger(__name__)

FIND_S = 3.0
CONNECT_S = 10.0
ASKED_S = 6.0
"""Seconds for the first members to say whether they can dial this machine."""
PEERS_AT_ONCE = 16
PINGS = 3
ANSWER_S = 60.0
LIST_S = 5.0
NETWORK = b"network\n"
LIST = b"list\n"
MAX_QUESTION_BYTES = 16
REPORTS_AT_ONCE = 2
MAX_REPORT_BYTES = 4 << 20
MAX_SOCKET_PATH_BYTES = 100
"""The system takes about so many in the name of a socket."""

_Report = TypeVar("_Report", "NetworkReport", "ListReport")
_Text = Annotated[str, msgspec.Meta(max_length=1000)]


class PeerReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one member is reached.

    Attributes:
        peer: The member.
        path: The way to it; None when there is none.
        relay: The member that relays.
        round_trip_ms: The shortest of a few round trips of a small message.
        layers: What it serves, as ``0:10``; empty for nothing.
        problem: Why there is no way, or no answer.
        code: The code of that error, and ``hint`` what to do about it.
    """

    peer: _Text
    path: Literal["direct", "punched", "relayed"] | None = None
    relay: _Text | None = None
    round_trip_ms: float | None = None
    layers: _Text = ""
    problem: _Text = ""
    code: _Text = ""
    hint: _Text = ""


class NetworkReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How this machine is reached, and how it reaches the others.

    Attributes:
        peer: This member.
        reach: Whether members can dial it.
        addresses: What it tells others.
        layers: What it serves, as ``0:10``; empty for nothing.
        peers: The other members.
    """

    peer: _Text
    reach: Reach
    addresses: tuple[_Text, ...]
    layers: _Text = ""
    peers: tuple[PeerReport, ...]


class ListReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the member list of a running process stands.

    Attributes:
        swarm_id: Of its swarm, in hex.
        state: Whether the list is in force.
        age_s: Seconds since somebody with authority called it the newest, if that is known.
        alarms: What is wrong with the backend, or with an administrator, in words.
    """

    swarm_id: _Text
    state: AllowState
    age_s: float | None
    alarms: tuple[_Text, ...]


def report_list(node: Node) -> ListReport:
    """Say how the member list stands."""
    found = node.keeper.report()
    return ListReport(
        swarm_id=node.options.swarm_id.hex(),
        state=found.state,
        age_s=found.age_s if math.isfinite(found.age_s) else None,
        alarms=tuple(f"{alarm.kind}: {alarm.text}"[:1000] for alarm in found.alarms),
    )


async def report_network(node: Node) -> NetworkReport:
    """Connect to every member that this one can reach, and say how."""
    if node.host.connected_peers():
        with trio.move_on_after(ASKED_S):
            await node.traversal.asked.wait()
    others = node.members() - {node.peer_id}
    announced = await node.discovery.find(others, deadline_s=FIND_S)
    limiter = trio.CapacityLimiter(PEERS_AT_ONCE)
    reports: dict[PeerId, PeerReport] = {}

    async def report(peer: PeerId) -> None:
        addresses = node.contacts.addresses(peer)
        if peer in announced:
            addresses += announced[peer].addresses
        async with limiter:
            found = await _report_peer(node, peer, addresses)
        reports[peer] = msgspec.structs.replace(found, layers=_layers(announced.get(peer)))

    async with trio.open_nursery() as nursery:
        for peer in others:
            nursery.start_soon(report, peer)
    return NetworkReport(
        peer=node.peer_id,
        reach=node.traversal.state.reach,
        addresses=node.host.addresses(),
        layers=_layers(node.discovery.announcements().get(node.peer_id)),
        peers=tuple(reports[peer] for peer in sorted(reports)),
    )


def _layers(announcement: Announcement | None) -> str:
    return "" if announcement is None else str(announcement.layers)


async def _report_peer(node: Node, peer: PeerId, addresses: tuple[str, ...]) -> PeerReport:
    try:
        await node.host.connect(peer, addresses, deadline_s=CONNECT_S)
        trips_s = [await node.host.round_trip_s(peer) for _ in range(PINGS)]
    except PeerUnreachable as error:
        return PeerReport(
            peer=peer, problem=str(error)[:1000], code=error.code, hint=error.hint[:1000]
        )
    path = node.host.path(peer)
    if path is None:
        return PeerReport(peer=peer, problem="the connection was lost at once")
    return PeerReport(peer=peer, path=path.kind, relay=path.relay, round_trip_ms=min(trips_s) * 1e3)


def socket_path(profile: Path) -> Path:
    """Return where a running member of this profile answers."""
    return profile / "node.sock"


async def serve_reports(
    node: Node, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Answer who asks for a report, until cancelled."""
    path = socket_path(node.options.profile.path)
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        _log.warning("`pals doctor` cannot ask this process: the profile's path is too long")
        task_status.started()
        return
    limiter = trio.CapacityLimiter(REPORTS_AT_ONCE)

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            with trio.move_on_after(ANSWER_S), suppress(trio.BrokenResourceError):
                await _answer(node, stream, limiter)

    listener = _listen(path)
    task_status.started()
    try:
        await trio.serve_listeners(answer, [listener])
    finally:
        path.unlink(missing_ok=True)


async def _answer(node: Node, stream: trio.SocketStream, limiter: trio.CapacityLimiter) -> None:
    asked = bytearray()
    while b"\n" not in asked:
        part = await stream.receive_some(MAX_QUESTION_BYTES)
        asked += part
        if not part or len(asked) > MAX_QUESTION_BYTES:
            return
    question = bytes(asked)
    if question == NETWORK:
        async with limiter:
            await stream.send_all(msgspec.json.encode(await report_network(node)))
    elif question == LIST:
        await stream.send_all(msgspec.json.encode(report_list(node)))


def _listen(path: Path) -> trio.SocketListener:
    # Whoever ran before and was killed left its socket; the profile's lock is ours.
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(path))
    path.chmod(0o600)
    listening.listen()
    return trio.SocketListener(trio.socket.from_stdlib_socket(listening))


async def ask_running(profile: Path) -> NetworkReport | None:
    """Return the report of the process that runs with a profile, or None if none does.

    Raises:
        InvalidConfig: What answers is not a process of this version.
    """
    return await _ask(profile, NETWORK, NetworkReport, ANSWER_S)


async def ask_list(profile: Path) -> ListReport | None:
    """Return how the list of the process stands that runs with a profile, or None.

    Raises:
        InvalidConfig: What answers is not a process of this version.
    """
    return await _ask(profile, LIST, ListReport, LIST_S)


async def _ask(
    profile: Path, question: bytes, kind: type[_Report], deadline_s: float
) -> _Report | None:
    path = socket_path(profile)
    answer = bytearray()
    try:
        with trio.fail_after(deadline_s):
            async with await trio.open_unix_socket(str(path)) as stream:
                await stream.send_all(question)
                async for part in stream:
                    answer += part
                    if len(answer) > MAX_REPORT_BYTES:
                        break
    except (OSError, trio.BrokenResourceError):
        return None
    except trio.TooSlowError as error:
        raise _no_report(path, f"no answer within {deadline_s:g} s") from error
    try:
        return msgspec.json.decode(answer, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _no_report(path, str(error)) from error


def _no_report(path: Path, problem: str) -> PalsError:
    advice = "restart the process that runs with this profile"
    return InvalidConfig(source=path, problem=problem, advice=advice)
