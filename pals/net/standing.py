"""Where a profile stands in its swarm: what `pals status` and `pals swarm list` show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import trio

from pals.config import Profile, SwarmEntry
from pals.errors import InvalidRecord, PalsError, RosterRefused
from pals.net.administration import load_operator
from pals.net.backend import Backend
from pals.net.backends import open_backend
from pals.net.membership import SavedList, fetch_list, keep_list, load_saved
from pals.net.removal import needs_rotation
from pals.net.report_socket import ask_list
from pals.swarm import kept
from pals.swarm.allowlist import AllowList, AllowState
from pals.swarm.identity import Identity, load_or_create_identity
from pals.swarm.roster import Roster
from pals.types import SwarmId

LOOK_S = 5.0

Part = Literal["operator", "admin", "member", "removed", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One swarm of a profile, as far as it is known.

    Attributes:
        entry: What the profile holds.
        part: What the profile may do there; ``unknown`` without a verified list.
        roster: The newest verified list, or None.
        state: Whether that list is in force.
        age_s: Seconds since somebody with authority called it the newest; None when that
            is not known.
        alarms: What is wrong with the backend, in words.
        next_step: What to do now, in words; empty for nothing.
    """

    entry: SwarmEntry
    part: Part
    roster: Roster | None
    state: AllowState
    age_s: float | None
    alarms: tuple[str, ...]
    next_step: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    saved: SavedList | None
    problem: PalsError | None = None

    @property
    def roster(self) -> Roster | None:
        return None if self.saved is None else self.saved.roster

    @property
    def age_s(self) -> float | None:
        return None if self.saved is None else self.saved.age_s

    @property
    def state(self) -> AllowState:
        allow_list = AllowList()
        if self.saved is not None:
            allow_list.update(self.saved.roster, trio.current_time(), age_s=self.saved.age_s)
        return allow_list.state(trio.current_time())


async def look_at(profile: Profile, entry: SwarmEntry, *, deadline_s: float = LOOK_S) -> Standing:
    """Return where the profile stands, by the backend's list or the last one verified.

    A process that runs with the profile is asked too: it knows what other members said.

    Raises:
        ProfileExposed: Others can read a file of the profile.
        InvalidConfig: A file of the profile is damaged.
    """
    client = open_backend(entry.backend_url, profile, deadline_s=deadline_s)
    swarm_id = SwarmId(bytes.fromhex(entry.swarm_id))
    found = await _find(profile, swarm_id, client)
    running = await ask_list(profile.path)
    if running is not None and running.swarm_id != entry.swarm_id:
        running = None
    part = _part(profile, entry, found.roster)
    waiting = len(kept.load_removals(profile, swarm_id))
    return Standing(
        entry=entry,
        part=part,
        roster=found.roster,
        state=found.state if running is None else running.state,
        age_s=found.age_s if running is None else running.age_s,
        alarms=_alarms(found.problem) + (() if running is None else running.alarms),
        next_step=_next_step(entry, part, found, waiting),
    )


async def _find(profile: Profile, swarm_id: SwarmId, client: Backend) -> _Found:
    saved = load_saved(profile, swarm_id)
    try:
        newest = await fetch_list(client, swarm_id, saved)
    except PalsError as problem:
        return _Found(saved=saved, problem=problem)
    keep_list(profile, swarm_id, newest.held)
    return _Found(saved=newest)


def _part(profile: Profile, entry: SwarmEntry, roster: Roster | None) -> Part:
    if load_operator(profile, entry) is not None:
        return "operator"
    if roster is None:
        return "unknown"
    identity: Identity = load_or_create_identity(profile)
    if identity.peer_id not in roster.live:
        return "removed"
    return "admin" if roster.may_administer(identity.public_key) else "member"


def _alarms(problem: PalsError | None) -> tuple[str, ...]:
    # No answer is no attack; another list than the one verified before may be.
    return (str(problem),) if isinstance(problem, RosterRefused | InvalidRecord) else ()


def _way_out(entry: SwarmEntry, found: _Found) -> str:
    if found.problem is None:
        return (
            "by this machine's clock nobody said lately that the list is the newest; set it right"
        )
    return f"start the backend at {entry.backend_url}, and check this machine's clock"


def _next_step(entry: SwarmEntry, part: Part, found: _Found, waiting: int) -> str:
    roster, signs = found.roster, part in ("operator", "admin")
    if part == "removed":
        return "this machine was removed: run `pals swarm leave`, and ask for a new invite"
    if found.saved is None or roster is None or found.state in ("none", "expired"):
        return f"members refuse each other: {_way_out(entry, found)}"
    if waiting and signs:
        return f"removals wait for the backend ({waiting}): run `pals swarm rotate` when it answers"
    if found.problem is not None:
        return f"check the backend: {found.problem}"
    if entry.epoch < roster.epoch:
        return "the swarm has a newer secret: run `pals shard` or `pals serve` to get it"
    if signs and needs_rotation(found.saved.held.records()):
        return "a machine that went knows the secret: run `pals swarm rotate`"
    if signs and len(roster.live) == 1:
        return "let another machine in with `pals invite create`"
    return ""
