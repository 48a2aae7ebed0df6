"""What a running process says of itself: to `pals doctor`, `peers list`, `status`, `ps`, `ping`.

`pals.net.report_socket` is where it is asked.
"""

from __future__ import annotations

import math
import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import trio

from pals.errors import PalsError, PeerUnreachable
from pals.net.announce import Announcement
from pals.net.hosted import is_hosted_here
from pals.net.nat.reachability import Reach
from pals.net.overview import SwarmReport, describe_models
from pals.net.process_report import ProcessReport, RoleLine
from pals.swarm.allowlist import AllowState
from pals.types import PeerId

if TYPE_CHECKING:
    from pals.net.node import Node

FIND_S = 3.0
CONNECT_S = 10.0
ASKED_S = 6.0
"""Seconds for the first members to say whether they can dial this machine."""
PEERS_AT_ONCE = 16
PINGS = 3
PING_S = 2.0
PING_PAUSE_S = 0.2
MAX_PINGS = 20

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


class PingReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Round trips of a small sealed message over the link with one member.

    Attributes:
        peer: The member.
        path: The way to it; None when there is none.
        relay: The member that relays.
        tries_ms: Milliseconds of each try, in order; None for one without an answer.
        problem: Why there is no link.
        code: The code of that error, and ``hint`` what to do about it.
    """

    peer: _Text
    path: Literal["direct", "punched", "relayed"] | None = None
    relay: _Text | None = None
    tries_ms: Annotated[tuple[float | None, ...], msgspec.Meta(max_length=MAX_PINGS)] = ()
    problem: _Text = ""
    code: _Text = ""
    hint: _Text = ""


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


async def report_shards(node: Node) -> SwarmReport:
    """Say what the members serve, as far as this one has heard; asks them if it has not."""
    announced = node.discovery.announcements()
    if not announced:
        announced = await node.discovery.find(node.members(), deadline_s=FIND_S)
    ways = {peer: node.host.path(peer) for peer in announced}
    paths = {peer: way.kind for peer, way in ways.items() if way is not None}
    return SwarmReport(
        swarm_id=node.options.swarm_id.hex(),
        peer=node.peer_id,
        models=describe_models(announced.values(), paths | {node.peer_id: "this machine"}),
    )


def report_process(node: Node) -> ProcessReport:
    """Say what this process does, and what it takes."""
    options = node.options
    own = node.discovery.announcements().get(node.peer_id)
    model = "" if own is None else own.model_id
    roles = [msgspec.structs.replace(line, model=line.model or model) for line in node.roles()]
    if is_hosted_here(options.entry.backend_url, options.identity):
        roles.append(RoleLine(role="backend"))
    return ProcessReport(
        pid=os.getpid(),
        peer=node.peer_id,
        swarm=options.entry.name,
        swarm_id=options.swarm_id.hex(),
        uptime_s=trio.current_time() - node.started_at,
        memory_bytes=resident_bytes(),
        addresses=node.host.addresses(),
        endpoint=options.endpoint,
        roles=tuple(roles),
    )


def resident_bytes(statm: Path = Path("/proc/self/statm")) -> int:
    """Return the memory that this process holds; the most it ever held where no file says."""
    try:
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


async def report_ping(node: Node, peer: PeerId, tries: int) -> PingReport:
    """Link with a member, and measure so many round trips over the link."""
    addresses = node.contacts.addresses(peer)
    announced = node.discovery.announcements().get(peer)
    if announced is not None:
        addresses += announced.addresses
    try:
        await node.links.ensure(peer, addresses)
    except PalsError as error:
        return PingReport(
            peer=peer, problem=str(error)[:1000], code=error.code, hint=error.hint[:1000]
        )
    tries_ms: list[float | None] = []
    for number in range(min(tries, MAX_PINGS)):
        if number:
            await trio.sleep(PING_PAUSE_S)
        try:
            tries_ms.append(await node.ping(peer, deadline_s=PING_S) * 1e3)
        except PalsError:
            tries_ms.append(None)
    way = node.host.path(peer)
    return PingReport(
        peer=peer,
        path=None if way is None else way.kind,
        relay=None if way is None else way.relay,
        tries_ms=tuple(tries_ms),
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
