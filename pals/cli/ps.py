"""`pals ps`: what runs on this machine with a profile."""

from __future__ import annotations

import msgspec
import trio

from pals import config
from pals.cli import console
from pals.cli.formats import format_age
from pals.cli.options import ConfigDir, Json
from pals.config import Profile
from pals.engine.memory import format_bytes
from pals.errors import ProfileInUse
from pals.net.process_report import ProcessReport

HEADERS = ("pid", "role", "model", "layers", "sessions", "free tokens", "memory", "up")


def ps(*, config_dir: ConfigDir = None, json: Json = False) -> None:
    """Show what runs on this machine with the profile: its roles, ports and memory.

    Args:
        config_dir: Profile folder.
        json: Print one JSON document on standard output.
    """
    profile = Profile(config.config_dir(config_dir))
    profile.check_folder()
    found = trio.run(_ask, profile)
    starting = _holder(profile) if found is None else None
    if json:
        _print_json(found, starting)
    elif found is not None:
        _print(found)
    else:
        rows = [] if starting is None else [(starting, "starting", "", "", "", "", "", "")]
        console.table(HEADERS, rows)
        if starting is None:
            console.note("nothing runs with this profile: `pals shard` and `pals serve` do")


async def _ask(profile: Profile) -> ProcessReport | None:
    from pals.net.report_socket import ask_process

    return await ask_process(profile.path)


def _holder(profile: Profile) -> str | None:
    """Return the id of a process that holds the profile and does not answer yet."""
    try:
        with profile.lock():
            return None
    except ProfileInUse as error:
        return str(error.fields["pid"])


def _print_json(found: ProcessReport | None, starting: str | None) -> None:
    processes: list[object] = [] if found is None else [msgspec.to_builtins(found)]
    if starting is not None:
        processes = [{"pid": int(starting) if starting.isdecimal() else None, "roles": []}]
    console.json({"schema": 1, "processes": processes})


def _print(found: ProcessReport) -> None:
    memory, age = format_bytes(found.memory_bytes), format_age(found.uptime_s)
    rows: list[tuple[object, ...]] = [
        (
            found.pid,
            role.role,
            role.model,
            role.layers,
            "" if role.role == "backend" else role.sessions,
            "" if role.free_tokens is None else role.free_tokens,
            memory,
            age,
        )
        for role in found.roles
    ]
    if all(role.role == "backend" for role in found.roles):  # a shard that loads is none yet
        rows.append((found.pid, "member", "", "", "", "", memory, age))
    console.table(HEADERS, rows)
    console.out("")
    console.out(f"swarm    {found.swarm}")
    console.out(f"peer     {found.peer}")
    for address in found.addresses:
        console.out(f"address  {address}")
    if found.endpoint:
        console.out(f"serving  {found.endpoint}/v1")
