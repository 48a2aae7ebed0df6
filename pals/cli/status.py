"""`pals status`: where this machine stands in its swarms, what they serve, what to do next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

import msgspec
import trio
from cyclopts import Parameter, validators

from pals import config
from pals.cli import console
from pals.cli.announce import has_anybody_run
from pals.cli.formats import format_age
from pals.cli.network import member_options
from pals.cli.options import ConfigDir, Json, SwarmName
from pals.cli.process import ServerOptions, configure_logging
from pals.cli.swarm import describe
from pals.config import Profile, SwarmEntry
from pals.errors import NoSwarm, PalsError, PeerUnreachable
from pals.net.overview import ModelLines, SwarmReport
from pals.types import PeerId, short_id

if TYPE_CHECKING:
    from pals.net.standing import Standing

LOOK_S = 20.0
FIND_S = 3.0
INTERVAL_S = 5.0

Offline = Annotated[bool, Parameter(negative="", help="Look at no other machine.")]


def status(
    *,
    watch: Annotated[bool, Parameter(negative="", help="Show it anew until Ctrl-C.")] = False,
    interval: Annotated[
        float, Parameter(validator=validators.Number(gte=1, lte=3600))
    ] = INTERVAL_S,
    offline: Offline = False,
    swarm: SwarmName = None,
    config_dir: ConfigDir = None,
    json: Json = False,
) -> None:
    """Show the profile's swarms, the shards that serve their models, and what to do next.

    A process that runs with the profile is asked who serves what; else a member looks around
    for some seconds.

    Args:
        watch: Show it anew until Ctrl-C.
        interval: Seconds between two looks, with `--watch`.
        offline: Look at no other machine.
        swarm: Name or id of one swarm; all of them when left out.
        config_dir: Profile folder.
        json: Print one JSON document on standard output, with `--watch` one a line for each look.
    """
    configure_logging(verbose=False)
    profile = Profile(config.config_dir(config_dir))
    swarms = profile.load_swarms() if swarm is None else [profile.load_swarm(swarm)]
    if not swarms:
        raise NoSwarm(path=profile.path)
    trio.run(
        partial(
            _show, profile, swarms, watch=interval if watch else None, offline=offline, json=json
        )
    )


async def _show(
    profile: Profile,
    swarms: Sequence[SwarmEntry],
    *,
    watch: float | None,
    offline: bool,
    json: bool,
) -> None:
    """Show it once, or every ``watch`` seconds until cancelled.

    Between two looks nothing is held: a process of the profile may begin or end meanwhile.
    """
    print_all = _print_json if json else partial(_print, clear=watch is not None)

    async def show() -> None:
        standings = await _look_at_all(profile, swarms)
        print_all(standings, await _ask_about_shards(profile, standings, offline=offline))

    await show()
    while watch is not None:
        await trio.sleep(watch)
        try:
            await show()
        except* PalsError as failed:  # as of a process that ends while it is asked
            console.warn(str(failed.exceptions[0]))


async def _look_at_all(profile: Profile, swarms: Sequence[SwarmEntry]) -> list[Standing]:
    """Ask all backends at the same time, each within its deadline."""
    from pals.net.standing import look_at

    found: dict[str, Standing] = {}

    async def look(entry: SwarmEntry) -> None:
        found[entry.swarm_id] = await look_at(profile, entry)

    async with trio.open_nursery() as nursery:
        for entry in swarms:
            nursery.start_soon(partial(look, entry))
    return [found[entry.swarm_id] for entry in swarms]


# --- who serves what -----------------------------------------------------------------


async def _ask_about_shards(
    profile: Profile, standings: Sequence[Standing], *, offline: bool
) -> dict[str, SwarmReport]:
    """Ask about the shards of one swarm, by its id: one identity is in one swarm at a time."""
    from pals.net.report_socket import ask_shards

    running = await ask_shards(profile.path)
    if running is not None:
        return _of_these(standings, running)
    return {} if offline else await _ask_as_member(profile, standings)


def _of_these(standings: Sequence[Standing], running: SwarmReport) -> dict[str, SwarmReport]:
    if running.swarm_id in {standing.entry.swarm_id for standing in standings}:
        return {running.swarm_id: running}
    console.note("what runs with this profile is in another swarm: stop it to see these shards")
    return {}


async def _ask_as_member(profile: Profile, standings: Sequence[Standing]) -> dict[str, SwarmReport]:
    worth = [s.entry for s in standings if await has_anybody_run(profile, s.entry)]
    for entry in worth[1:]:
        console.note(f"`pals status --swarm {entry.name}` shows the shards of that one")
    try:
        return {entry.swarm_id: await _run_member(profile, entry) for entry in worth[:1]}
    except PalsError as error:
        console.warn(f"no member was asked: {error}")
        return {}


async def _run_member(profile: Profile, entry: SwarmEntry) -> SwarmReport:
    """Run a member of the profile for some seconds, and return what it knows of the shards.

    Raises:
        ProfileInUse: Another process runs with the profile.
        PeerUnreachable: The network was not ready in time.
    """
    from pals.net.node import open_node
    from pals.net.report import report_shards

    options = member_options(ServerOptions(config_dir=profile.path, swarm=entry.swarm_id))
    with profile.lock(), trio.move_on_after(LOOK_S) as scope:
        async with open_node(options) as node:
            await node.discovery.find(node.members(), deadline_s=FIND_S)
            scope.deadline = math.inf
            return await report_shards(node)
    problem = f"the network was not ready within {LOOK_S:g} s"
    raise PeerUnreachable(peer=options.identity.peer_id, problem=problem)


# --- for people and programs ---------------------------------------------------------


def _print_json(standings: Sequence[Standing], reports: Mapping[str, SwarmReport]) -> None:
    swarms = [
        describe(standing) | {"models": _models(reports.get(standing.entry.swarm_id))}
        for standing in standings
    ]
    console.json({"schema": 1, "swarms": swarms})


def _models(report: SwarmReport | None) -> list[object] | None:
    return None if report is None else msgspec.to_builtins(report.models)


def _print(
    standings: Sequence[Standing], reports: Mapping[str, SwarmReport], *, clear: bool
) -> None:
    if clear:
        console.clear()
    headers = ("swarm", "role", "members", "epoch", "list", "age")
    console.table(headers, [_row(standing) for standing in standings])
    for report in reports.values():
        for model in report.models:
            _print_model(model, report.peer)
    for standing in standings:
        _print_advice(standing, reports.get(standing.entry.swarm_id))


def _print_model(model: ModelLines, own: str) -> None:
    console.out("")
    console.out(f"{model.model}, {model.num_layers} layers")
    rows = [
        (
            shard.layers,
            short_id(PeerId(shard.peer)),
            shard.dtype,
            shard.free_tokens,
            shard.max_context_tokens,
            f"{shard.step_ms:.1f}",
            "this machine" if shard.peer == own else shard.path,
            shard.state,
        )
        for shard in model.shards
    ]
    headers = ("layers", "peer", "dtype", "free tokens", "context", "step ms", "path", "state")
    console.table(headers, rows)


def _print_advice(standing: Standing, report: SwarmReport | None) -> None:
    """Say what is wrong and what to do, the most general first."""
    name = standing.entry.name
    for alarm in standing.alarms:
        console.warn(f"{name}: {alarm}")
    if standing.next_step:
        console.note(f"{name}: {standing.next_step}")
    if report is None:
        return
    if not report.models:
        model = standing.entry.model
        console.note(
            f"{name}: nobody serves layers yet: `pals shard {model}` does, once it is loaded"
        )
    for model in report.models:
        for problem in model.problems:
            console.warn(problem.text)
            console.note(f"  {problem.hint}")


def _row(standing: Standing) -> tuple[object, ...]:
    shown = describe(standing)
    members = "?" if shown["members"] is None else shown["members"]
    return (
        standing.entry.name,
        standing.part,
        members,
        shown["epoch"],
        standing.state,
        format_age(standing.age_s),
    )
