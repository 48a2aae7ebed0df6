"""`pals peers`: see and remove members."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import trio
from cyclopts import Parameter

from pals import config
from pals.cli import console
from pals.cli.announce import tell_members
from pals.cli.formats import format_age, format_moment
from pals.cli.options import ConfigDir, Json, SwarmName
from pals.cli.process import ServerOptions, configure_logging
from pals.config import Profile
from pals.errors import PalsError
from pals.swarm.identity import load_or_create_identity, public_key_of
from pals.swarm.roster import Member, Roster
from pals.types import PeerId, short_id

if TYPE_CHECKING:
    from pals.net.enrolment import Membership
    from pals.net.removal import Removal
    from pals.net.report import NetworkReport

LOOK_S = 20.0
EXIT_UNFINISHED = 3

Offline = Annotated[bool, Parameter(negative="", help="Look at no other machine.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Peer:
    """One row of the list."""

    member: Member
    invite: str
    role: str
    seen_at: int | None
    layers: str
    is_self: bool


def list_peers(
    *,
    offline: Offline = False,
    swarm: SwarmName = None,
    config_dir: ConfigDir = None,
    json: Json = False,
) -> None:
    """List the members of the swarm: by which invite they came, when they were seen.

    A process that runs with the profile is asked who is there and serves what; else a
    member looks around for some seconds.

    Args:
        offline: Ask the backend only, and no member.
        swarm: Name or id of the swarm.
        config_dir: Profile folder.
        json: Print one JSON document on standard output.
    """
    configure_logging(verbose=False)
    profile = Profile(config.config_dir(config_dir))
    membership, seen = trio.run(_look_up, profile, swarm)
    others = len(membership.roster.live) - 1
    report = _look_around(config_dir, swarm) if others and seen and not offline else None
    peers = _peers(profile, membership.roster, seen, report)
    if json:
        described = [_describe(peer) for peer in peers]
        console.json({"schema": 1, "member_list": membership.state, "peers": described})
    else:
        _print(peers)
    if membership.state != "fresh":
        console.warn("the backend did not answer: this is the last verified list")


def kick(
    peer: str,
    /,
    *,
    swarm: SwarmName = None,
    config_dir: ConfigDir = None,
    json: Json = False,
) -> int:
    """Remove a member, close the invite it came by, and give the swarm a new secret.

    When the backend does not answer, running members hear of the removal all the same;
    the same command ends it later.

    Args:
        peer: Its peer id, or the first or last characters of it.
        swarm: Name or id of the swarm.
        config_dir: Profile folder.
        json: Print one JSON document on standard output.

    Returns:
        3 when the backend has not taken all of it yet, otherwise 0.
    """
    from pals.net.removal import remove_peer

    profile = Profile(config.config_dir(config_dir))
    removal = trio.run(partial(remove_peer, profile, peer, now=time.time(), swarm=swarm))
    trio.run(tell_members, profile, removal.entry)
    if json:
        console.json(_describe_removal(removal))
    else:
        console.out(f"removed {removal.peer}")
    _explain(removal)
    return 0 if removal.is_rotated else EXIT_UNFINISHED


async def _look_up(profile: Profile, swarm: str | None) -> tuple[Membership, Mapping[PeerId, int]]:
    from pals.net.enrolment import look_up
    from pals.net.presence import fetch_sightings

    membership = await look_up(profile, swarm)
    return membership, await fetch_sightings(profile, membership.entry)


def _look_around(config_dir: ConfigDir, swarm: str | None) -> NetworkReport | None:
    """Return what members say now; None when there is no way to ask them."""
    from pals.cli.network import ask_network

    try:
        return ask_network(ServerOptions(config_dir=config_dir, swarm=swarm), deadline_s=LOOK_S)
    except PalsError as error:
        console.warn(f"no member was asked: {error}")
        return None


def _peers(
    profile: Profile, roster: Roster, seen: Mapping[PeerId, int], report: NetworkReport | None
) -> list[_Peer]:
    own = load_or_create_identity(profile).peer_id
    layers = {} if report is None else {PeerId(p.peer): p.layers for p in report.peers}
    reached = () if report is None else (p.peer for p in report.peers if p.path is not None)
    seen = dict(seen) | dict.fromkeys(map(PeerId, reached), int(time.time()))
    if report is not None:
        layers[own] = report.layers
    return [
        _Peer(
            member=member,
            invite=_invite(roster, member),
            role=_role(roster, member),
            seen_at=seen.get(member.peer),
            layers=layers.get(member.peer, ""),
            is_self=member.peer == own,
        )
        for member in roster.live.values()
    ]


def _invite(roster: Roster, member: Member) -> str:
    """Return by which invite a member came: its note, else its id."""
    if member.invite is None:
        return "genesis"
    note = roster.invites[member.invite].certificate.note
    return f"{note} ({short_id(member.invite)})" if note else f"invite {short_id(member.invite)}"


def _role(roster: Roster, member: Member) -> str:
    if member.invite is None:
        return "operator"
    return "admin" if roster.may_administer(public_key_of(member.peer)) else "member"


def _describe(peer: _Peer) -> dict[str, object]:
    return {
        "peer": peer.member.peer,
        "joined": format_moment(peer.member.joined_at),
        "via": peer.invite,
        "role": peer.role,
        "seen": format_moment(peer.seen_at) or None,
        "layers": peer.layers or None,
        "self": peer.is_self,
    }


def _print(peers: list[_Peer]) -> None:
    now = time.time()
    rows = [
        (
            peer.member.peer,
            format_moment(peer.member.joined_at),
            peer.invite,
            peer.role,
            "this machine" if peer.is_self else _seen(peer.seen_at, now),
            peer.layers,
        )
        for peer in peers
    ]
    console.table(("peer", "joined", "via", "role", "seen", "layers"), rows)


def _seen(at: int | None, now: float) -> str:
    return "never" if at is None else f"{format_age(now - at)} ago"


def _describe_removal(removal: Removal) -> dict[str, object]:
    return {
        "schema": 1,
        "peer": removal.peer,
        "listed": removal.is_listed,
        "rotated": removal.is_rotated,
        "epoch": removal.entry.epoch,
    }


def _explain(removal: Removal) -> None:
    """Say what is missing, and how to end it."""
    if removal.is_rotated:
        console.note(f"the swarm has a new secret, that of epoch {removal.entry.epoch}")
    elif removal.is_listed:
        console.warn(f"the swarm still has its old secret: {removal.problem}")
        console.note("run `pals swarm rotate` when the backend answers")
    else:
        console.warn(f"the backend did not take the removal: {removal.problem}")
        console.note(
            "running members hear of it from each other; "
            f"run `pals peers kick {short_id(removal.peer)}` again when the backend answers"
        )
