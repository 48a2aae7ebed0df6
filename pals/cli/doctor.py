"""`pals doctor`: whether this machine can run Pals, and what to mend."""

from __future__ import annotations

from dataclasses import asdict

from pals import config
from pals.cli import console, network
from pals.cli.checks import CHECKS, Finding, Subject, run_checks
from pals.cli.network import Network, examine_network
from pals.cli.options import Json
from pals.cli.process import NO_SERVER_OPTIONS, ServerOptions, configure_logging


def doctor(
    *,
    port: int | None = None,
    model: str | None = None,
    offline: bool = False,
    options: ServerOptions = NO_SERVER_OPTIONS,
    json: Json = False,
) -> int:
    """Check this machine and how it reaches the other members, and say what to mend.

    A process that runs with the profile is asked how it is connected; else a member is run
    for some seconds, with the options of `pals shard` and `pals serve`.

    Args:
        port: Port that `pals serve` is to take; its default when left out.
        model: Model to look for, as `org/name` or a path.
        offline: Leave out the members.
        options: Options of the member.
        json: Print one JSON document on standard output.

    Returns:
        1 when a check fails, otherwise 0.
    """
    configure_logging(verbose=options.verbose)
    subject = Subject(
        profile=config.config_dir(options.config_dir),
        port=config.load_settings().serve.port if port is None else port,
        model=model,
    )
    found = run_checks(CHECKS, subject)
    broken = any(
        name in found and found[name].state == "fail" for name in ("libp2p", "profile", "clock")
    )
    members = None if offline or broken else examine_network(options)
    if json:
        _print_json(found, members)
    else:
        _print_table(found, members)
    findings = [*found.values(), *([members.finding] if members is not None else [])]
    return 1 if any(finding.state == "fail" for finding in findings) else 0


def _print_json(found: dict[str, Finding], members: Network | None) -> None:
    checks = [_entry(c.name, c.code, found[c.name]) for c in CHECKS]
    if members is not None:
        checks.append(_entry(network.NAME, network.CODE, members.finding))
    report = None if members is None else members.document()
    console.json({"schema": 1, "checks": checks, "network": report})


def _entry(name: str, code: str, finding: Finding) -> dict[str, str]:
    return {"name": name, "code": code, **asdict(finding)}


def _print_table(found: dict[str, Finding], members: Network | None) -> None:
    if members is not None:
        found = found | {network.NAME: members.finding}
    console.table(("check", "state", "found"), [(n, f.state, f.text) for n, f in found.items()])
    if members is not None and members.rows():
        console.out("")
        console.table(("member", "path", "round trip", "problem"), members.rows())
    for name, finding in found.items():
        if finding.hint:
            console.note(f"{name}: {finding.hint}")
