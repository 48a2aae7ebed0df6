"""`pals ping`: how long a small message takes to a member and back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

import msgspec
import trio
from cyclopts import Parameter, validators

from pals.cli import console
from pals.cli.network import run_member
from pals.cli.options import Json
from pals.cli.process import NO_SERVER_OPTIONS, ServerOptions, configure_logging
from pals.types import PeerId

if TYPE_CHECKING:
    from pals.net.node import Node
    from pals.net.report import PingReport

DEADLINE_S = 75.0
MEET_S = 3.0
MAX_COUNT = 20
EXIT_SILENT = 3


def ping(
    peer: str,
    /,
    *,
    count: Annotated[int, Parameter(validator=validators.Number(gte=1, lte=MAX_COUNT))] = 4,
    options: ServerOptions = NO_SERVER_OPTIONS,
    json: Json = False,
) -> int:
    """Measure round trips of a small message over the encrypted link with a member.

    A process that runs with the profile does it; else a member is run for as long as it takes.

    Args:
        peer: Its peer id, or the first or last characters of it.
        count: How many tries.
        options: Options of the member.
        json: Print one JSON document on standard output.

    Returns:
        3 when no try was answered, otherwise 0.
    """
    configure_logging(verbose=options.verbose)
    wanted = _find(options, peer)
    report = trio.run(_ask, options, wanted, count) or run_member(
        options, partial(_ping, peer=wanted, count=count), DEADLINE_S
    )
    if json:
        console.json({"schema": 1, **msgspec.to_builtins(report), **summarize(report.tries_ms)})
    else:
        _print(report)
    return 0 if any(took is not None for took in report.tries_ms) else EXIT_SILENT


def _find(options: ServerOptions, peer: str) -> PeerId:
    """Return the member that is meant, by the last verified list.

    Raises:
        UnknownPeer: There is none.
        AmbiguousPeer: There are several.
        RosterUnavailable: There is no list.
    """
    from pals.errors import RosterUnavailable
    from pals.net.administration import find_member
    from pals.net.membership import load_saved
    from pals.types import SwarmId

    entry = options.profile.load_swarm(options.swarm)
    saved = load_saved(options.profile, SwarmId(bytes.fromhex(entry.swarm_id)))
    if saved is None:
        raise RosterUnavailable(url=entry.backend_url, problem="none was ever verified here")
    return find_member(saved.roster, peer).peer


async def _ask(options: ServerOptions, peer: PeerId, count: int) -> PingReport | None:
    from pals.net.report_socket import ask_ping

    return await ask_ping(options.profile.path, peer, count)


async def _ping(node: Node, *, peer: PeerId, count: int) -> PingReport:
    from pals.net.report import report_ping

    await node.discovery.find([peer], deadline_s=MEET_S)
    return await report_ping(node, peer, count)


def summarize(tries_ms: Sequence[float | None]) -> dict[str, float | None]:
    """Return the part of tries without an answer, and the least, mean and most of the rest."""
    took = [ms for ms in tries_ms if ms is not None]
    return {
        "loss": round(1 - len(took) / len(tries_ms), 3) if tries_ms else 1.0,
        "min_ms": min(took, default=None),
        "avg_ms": sum(took) / len(took) if took else None,
        "max_ms": max(took, default=None),
    }


def _print(report: PingReport) -> None:
    way = report.path or "no way"
    if report.relay is not None:
        way = f"{way} by {report.relay}"
    console.out(f"{report.peer}  {way}")
    for number, took in enumerate(report.tries_ms, start=1):
        console.out(f"{number:>3}  {'no answer' if took is None else f'{took:.1f} ms'}")
    if report.problem:
        console.error(report.problem, hint=report.hint)
        return
    found = summarize(report.tries_ms)
    tries = "1 try" if len(report.tries_ms) == 1 else f"{len(report.tries_ms)} tries"
    text = f"{tries}, {found['loss']:.0%} lost"
    if found["avg_ms"] is not None:
        spread = "/".join(f"{found[name]:.1f}" for name in ("min_ms", "avg_ms", "max_ms"))
        text += f", min/avg/max {spread} ms"
    console.out(text)
