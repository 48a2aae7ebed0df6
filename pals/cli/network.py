"""How this machine reaches the other members: the part of `pals doctor` about the network.

A process that runs with the profile is asked, since it holds the connections; else a
member is run for as long as it takes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import msgspec
import trio

from pals import config
from pals.cli.checks import Finding
from pals.cli.process import Member, ServerOptions, node_options
from pals.config import Profile, SwarmSecret
from pals.errors import PalsError, PeerUnreachable
from pals.swarm.identity import load_or_create_identity

if TYPE_CHECKING:
    from pals.net.node import Node, NodeOptions
    from pals.net.report import NetworkReport, PeerReport

R = TypeVar("R")

CODE = "DOCTOR-NETWORK"
NAME = "network"
DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True)
class Network:
    """What was found out.

    Attributes:
        finding: The line among the checks.
        report: How each member is reached; None where nothing could be found out.
    """

    finding: Finding
    report: NetworkReport | None

    def document(self) -> dict[str, object] | None:
        """Return what programs are told of the report."""
        return None if self.report is None else msgspec.to_builtins(self.report)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return for each other member: its id, the way to it, the round trip, a problem."""
        peers = () if self.report is None else self.report.peers
        return [_row(peer) for peer in peers]


def examine_network(options: ServerOptions) -> Network | None:
    """Return how the members are reached, or None when the profile is of no swarm."""
    profile = options.profile
    if not profile.swarm_ids():
        return None
    try:
        report = ask_network(options)
    except PalsError as error:
        finding = Finding(state="fail", text=str(error), hint=error.hint)
        return Network(finding, None)
    return Network(_judge(report), report)


def ask_network(options: ServerOptions, *, deadline_s: float = DEADLINE_S) -> NetworkReport:
    """Ask the process that runs with the profile, or run a member for a while.

    Raises:
        NoSwarm: The profile is of none.
        ProfileInUse: A process runs with the profile, and does not answer.
        PeerUnreachable: It took too long.
    """
    return trio.run(_ask, options.profile) or run_member(options, _report, deadline_s)


async def _ask(profile: Profile) -> NetworkReport | None:
    from pals.net.report_socket import ask_running

    return await ask_running(profile.path)


async def _report(node: Node) -> NetworkReport:
    from pals.net.report import report_network

    return await report_network(node)


def run_member(
    options: ServerOptions, work: Callable[[Node], Awaitable[R]], deadline_s: float
) -> R:
    """Run a member of the profile for as long as some work on its node takes.

    Raises:
        NoSwarm: The profile is of none.
        ProfileInUse: Another process runs with the profile.
        PeerUnreachable: It took longer than ``deadline_s`` seconds.
    """
    made = member_options(options)
    with options.profile.lock():
        return trio.run(partial(_work_within, made, work, deadline_s))


def member_options(options: ServerOptions) -> NodeOptions:
    """Return what a node of the profile is made of, for a command that runs one for a while.

    Raises:
        NoSwarm: The profile is of none.
        SwarmSecretInvalid: Its secret is damaged.
    """
    settings = options.load_settings()
    entry = options.profile.load_swarm(options.swarm)
    text = config.take_environment(config.SWARM_SECRET_VARIABLE) or entry.swarm_secret
    member = Member(
        profile=options.profile,
        entry=entry,
        secret=SwarmSecret.parse(text),
        identity=load_or_create_identity(options.profile),
    )
    return node_options(member, settings)


async def _work_within(
    options: NodeOptions, work: Callable[[Node], Awaitable[R]], deadline_s: float
) -> R:
    from pals.net.node import open_node

    with trio.move_on_after(deadline_s):
        async with open_node(options) as node:
            return await work(node)
    problem = f"the network was not ready within {deadline_s:g} s"
    raise PeerUnreachable(peer=options.identity.peer_id, problem=problem)


def _judge(report: NetworkReport) -> Finding:
    """Say in a line how this machine is reached, and what is worth mending."""
    text = {
        "public": "members can dial this machine",
        "private": "members cannot dial this machine, and meet it at others",
        "unknown": "no member outside this network could be asked",
    }[report.reach]
    lost = [peer for peer in report.peers if peer.code == "PALS-NO-PATH"]
    if lost:
        return Finding(
            state="warn", text=f"{text}; no way to {len(lost)} of them", hint=lost[0].hint
        )
    silent = [peer for peer in report.peers if peer.path is None]
    if report.peers and len(silent) == len(report.peers):
        hint = "check that one of them runs, and its address and firewall"
        return Finding(state="warn", text="no other member answers", hint=hint)
    return Finding(state="ok", text=text)


def _row(peer: PeerReport) -> tuple[str, str, str, str]:
    way = "none" if peer.path is None else peer.path
    if peer.relay is not None:
        way = f"{way} by {peer.relay}"
    trip = "" if peer.round_trip_ms is None else f"{peer.round_trip_ms:.1f} ms"
    return peer.peer, way, trip, peer.problem
