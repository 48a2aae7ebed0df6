"""`pals swarm`: make and look at the private group of machines."""

from __future__ import annotations

import time

from pals import config
from pals.cli import console
from pals.cli.options import ConfigDir, Json


async def create(
    *,
    model: str,
    name: str = "my-swarm",
    backend: str | None = None,
    config_dir: ConfigDir = None,
    json: Json = False,
) -> None:
    """Make a swarm and become its operator.

    Args:
        model: Model the swarm is for, such as `HuggingFaceTB/SmolLM2-135M-Instruct`.
        name: What people call the swarm.
        backend: Address of the membership backend; the preset's on this machine when left out.
        config_dir: Profile folder.
        json: Print one JSON document on standard output.
    """
    from pals.net.enrolment import create_swarm

    settings = config.load_settings().backend
    entry = await create_swarm(
        config.Profile(config.config_dir(config_dir)),
        name=name,
        model=model,
        backend_url=backend or f"http://{settings.host}:{settings.port}",
        now=time.time(),
    )
    if json:
        console.json({"schema": 1, **_describe(entry)})
        return
    console.out(f"swarm  {entry.swarm_id}")
    console.note("next: `pals invite create` for every other machine")


async def show(*, config_dir: ConfigDir = None, json: Json = False) -> None:
    """Show the swarm that the profile belongs to.

    Args:
        config_dir: Profile folder.
        json: Print one JSON document on standard output.
    """
    from pals.net.enrolment import look_up

    profile = config.Profile(config.config_dir(config_dir))
    membership = await look_up(profile)
    swarm = _describe(membership.entry) | {
        "members": len(membership.roster.members),
        "member_list": membership.state,
        "operator": profile.operator_key_path(membership.entry.swarm_id).is_file(),
    }
    if json:
        console.json({"schema": 1, **swarm})
        return
    for label, value in swarm.items():
        shown = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
        console.out(f"{label.replace('_', ' '):<12} {shown}")


def _describe(entry: config.SwarmEntry) -> dict[str, str | int | bool]:
    return {
        "swarm_id": entry.swarm_id,
        "name": entry.name,
        "model": entry.model,
        "backend": entry.backend_url,
        "epoch": entry.epoch,
    }
