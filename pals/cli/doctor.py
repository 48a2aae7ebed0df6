"""`pals doctor`: whether this machine can run Pals, and what to mend."""

from __future__ import annotations

from dataclasses import asdict

from pals import config
from pals.cli import console
from pals.cli.checks import CHECKS, Finding, Subject, run_checks
from pals.cli.options import ConfigDir, Json


def doctor(
    *,
    port: int | None = None,
    model: str | None = None,
    config_dir: ConfigDir = None,
    json: Json = False,
) -> int:
    """Check this machine and say what to mend.

    Args:
        port: Port that `pals serve` is to take; its default when left out.
        model: Model to look for, as `org/name` or a path.
        config_dir: Profile folder to check.
        json: Print one JSON document on standard output.

    Returns:
        1 when a check fails, otherwise 0.
    """
    subject = Subject(
        profile=config.config_dir(config_dir),
        port=config.load_settings().serve.port if port is None else port,
        model=model,
    )
    found = run_checks(CHECKS, subject)
    if json:
        _print_json(found)
    else:
        _print_table(found)
    return 1 if any(finding.state == "fail" for finding in found.values()) else 0


def _print_json(found: dict[str, Finding]) -> None:
    checks = [{"name": c.name, "code": c.code} | asdict(found[c.name]) for c in CHECKS]
    console.json({"schema": 1, "checks": checks})


def _print_table(found: dict[str, Finding]) -> None:
    console.table(("check", "state", "found"), [(n, f.state, f.text) for n, f in found.items()])
    for name, finding in found.items():
        if finding.hint:
            console.note(f"{name}: {finding.hint}")
