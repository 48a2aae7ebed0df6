"""Where a running process is asked for a report: a Unix socket in its profile folder.

Only its user may enter that folder. One connection, one line that names a report, one report
in JSON.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec
import trio

from pals.errors import InvalidConfig, PalsError
from pals.net.overview import SwarmReport
from pals.net.process_report import ProcessReport
from pals.net.report import (
    ListReport,
    NetworkReport,
    PingReport,
    report_list,
    report_network,
    report_ping,
    report_process,
    report_shards,
)
from pals.types import PeerId

if TYPE_CHECKING:
    from pals.net.node import Node

_log = logging.getLogger(__name__)

ANSWER_S = 60.0
LIST_S = 5.0
MAX_QUESTION_BYTES = 256
REPORTS_AT_ONCE = 2
MAX_REPORT_BYTES = 4 << 20
MAX_SOCKET_PATH_BYTES = 100
"""The system takes about so many in the name of a socket."""

_Report = TypeVar("_Report", bound=msgspec.Struct)


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
    report = await _make_report(node, bytes(asked).decode(errors="replace").split(), limiter)
    if report is not None:
        await stream.send_all(msgspec.json.encode(report))


async def _make_report(
    node: Node, question: Sequence[str], limiter: trio.CapacityLimiter
) -> msgspec.Struct | None:
    """Return what was asked for; None for what this version does not know."""
    match question:
        case ["list"]:
            return report_list(node)
        case ["process"]:
            return report_process(node)
        case ["shards"]:
            return await report_shards(node)
        case ["network"]:
            async with limiter:
                return await report_network(node)
        case ["ping", peer, tries] if tries.isdecimal():
            async with limiter:
                return await report_ping(node, PeerId(peer), int(tries))
        case _:
            return None


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
    return await _ask(profile, "network", NetworkReport, ANSWER_S)


async def ask_list(profile: Path) -> ListReport | None:
    """Return how the list of the process stands that runs with a profile, or None.

    Raises:
        InvalidConfig: What answers is not a process of this version.
    """
    return await _ask(profile, "list", ListReport, LIST_S)


async def ask_shards(profile: Path) -> SwarmReport | None:
    """Return what the process that runs with a profile knows of its swarm, or None.

    Raises:
        InvalidConfig: What answers is not a process of this version.
    """
    return await _ask(profile, "shards", SwarmReport, LIST_S)


async def ask_process(profile: Path) -> ProcessReport | None:
    """Return what the process does that runs with a profile, or None.

    Raises:
        InvalidConfig: What answers is not a process of this version.
    """
    return await _ask(profile, "process", ProcessReport, LIST_S)


async def ask_ping(profile: Path, peer: PeerId, tries: int) -> PingReport | None:
    """Have the process that runs with a profile ping a member; None if none runs.

    Raises:
        InvalidConfig: What answers is not a process of this version.
    """
    return await _ask(profile, f"ping {peer} {tries}", PingReport, ANSWER_S)


async def _ask(
    profile: Path, question: str, kind: type[_Report], deadline_s: float
) -> _Report | None:
    path = socket_path(profile)
    answer = bytearray()
    try:
        with trio.fail_after(deadline_s):
            async with await trio.open_unix_socket(str(path)) as stream:
                await stream.send_all(f"{question}\n".encode())
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
