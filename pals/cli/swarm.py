"""`pals swarm`: make and look at the private groups of machines, and change who signs."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from pals import config
from pals.cli import console
from pals.cli.announce import tell_members
from pals.cli.options import ConfigDir, Json, SwarmName
from pals.config import Profile, SwarmEntry
from pals.errors import InvalidConfig

if TYPE_CHECKING:
    from pals.net.standing import Standing

STREAM = Path("-")
KeyFile = Annotated[Path, Parameter(allow_leading_hyphen=True)]
OWN_BACKEND = "p2p"
MAX_KEY_CHARS = 4096


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
        backend: Address of the membership backend, or `p2p` to keep it in this profile; the
            preset's on this machine when left out.
        config_dir: Profile folder.
        json: Print one JSON document on standard output.
    """
    profile = Profile(config.config_dir(config_dir))
    entry = await make_swarm(profile, name=name, model=model, backend=backend)
    if json:
        console.json({"schema": 1, **_describe_entry(entry)})
        return
    console.out(f"swarm  {entry.swarm_id}")
    if backend == OWN_BACKEND:
        console.note("next: `pals serve` or `pals shard` here, which lets other machines join")
    console.note("next: `pals invite create` for every other machine")


async def make_swarm(profile: Profile, *, name: str, model: str, backend: str | None) -> SwarmEntry:
    """Make a swarm on the backend that is meant: the preset's, this profile's, or another."""
    from pals.net.enrolment import create_swarm
    from pals.net.hosted import own_backend_address

    settings = config.load_settings().backend
    address = backend or f"http://{settings.host}:{settings.port}"
    if backend == OWN_BACKEND:
        address = own_backend_address(profile)
    return await create_swarm(profile, name=name, model=model, backend_url=address, now=time.time())


def list_swarms(*, config_dir: ConfigDir = None, json: Json = False) -> None:
    """List the swarms that the profile belongs to, without asking anybody.

    Args:
        config_dir: Profile folder.
        json: Print one JSON document on standard output.
    """
    profile = Profile(config.config_dir(config_dir))
    swarms = profile.load_swarms()
    if json:
        listed = [
            _describe_entry(entry) | {"operator": _is_operator(profile, entry)} for entry in swarms
        ]
        console.json({"schema": 1, "swarms": listed})
        return
    rows = [
        (entry.name, entry.swarm_id[:8], entry.model, "yes" if _is_operator(profile, entry) else "")
        for entry in swarms
    ]
    console.table(("name", "id", "model", "operator"), rows)


async def show(
    *, swarm: SwarmName = None, config_dir: ConfigDir = None, json: Json = False
) -> None:
    """Show a swarm that the profile belongs to.

    Args:
        swarm: Name or id of the swarm.
        config_dir: Profile folder.
        json: Print one JSON document on standard output.
    """
    from pals.net.standing import look_at

    profile = Profile(config.config_dir(config_dir))
    shown = describe(await look_at(profile, profile.load_swarm(swarm)))
    if json:
        console.json({"schema": 1, **shown})
        return
    for label in ("name", "swarm_id", "model", "backend", "role", "members", "epoch", "list"):
        console.out(f"{label.replace('_', ' '):<10} {shown[label]}")


async def rotate(
    *, swarm: SwarmName = None, config_dir: ConfigDir = None, json: Json = False
) -> None:
    """Give the swarm a new secret, which the running members pass on.

    It also ends what an interrupted `pals peers kick` began.

    Args:
        swarm: Name or id of the swarm.
        config_dir: Profile folder.
        json: Print one JSON document on standard output.
    """
    from pals.net.removal import rotate as rotate_secret

    profile = Profile(config.config_dir(config_dir))
    entry = await rotate_secret(profile, now=time.time(), swarm=swarm)
    await tell_members(profile, entry)
    if json:
        console.json({"schema": 1, "swarm_id": entry.swarm_id, "epoch": entry.epoch})
    else:
        console.out(f"epoch  {entry.epoch}")


async def move(
    url: str, /, *, swarm: SwarmName = None, config_dir: ConfigDir = None, json: Json = False
) -> None:
    """Follow the membership backend to another address; every member does it once.

    The operator goes first, whose key says that the backend there may vouch for the list.

    Args:
        url: Where the backend answers now, with the swarm's records.
        swarm: Name or id of the swarm.
        config_dir: Profile folder.
        json: Print one JSON document on standard output.
    """
    from pals.net.moving import move_swarm

    profile = Profile(config.config_dir(config_dir))
    entry = profile.load_swarm(swarm)
    is_appointed = await move_swarm(profile, entry, url, now=time.time())
    if json:
        document = {"swarm_id": entry.swarm_id, "backend": url, "appointed": is_appointed}
        console.json({"schema": 1, **document})
    else:
        console.out(f"backend  {url}")
    if not is_appointed:
        console.warn(
            f"the operator of `{entry.name}` has not named this backend yet: nobody takes its "
            "word for the list before"
        )
    console.note("start what runs with this profile anew")


async def leave(
    *, swarm: SwarmName = None, force: bool = False, config_dir: ConfigDir = None
) -> None:
    """Leave a swarm and delete what the profile holds of it, its secret included.

    An operator leaves only a swarm that has an admin: nobody could let a machine in or
    remove one any more.

    Args:
        swarm: Name or id of the swarm.
        force: Leave in spite of that, or though the backend does not answer.
        config_dir: Profile folder.
    """
    from pals.net.enrolment import leave_swarm

    profile = Profile(config.config_dir(config_dir))
    entry = profile.load_swarm(swarm)
    is_listed = await leave_swarm(profile, entry, is_forced=force)
    console.out(f"left {entry.name}, swarm {entry.swarm_id}")
    if not is_listed:
        console.warn("the backend took no notice: the others still list this machine as a member")


async def appoint(
    peer: str,
    /,
    *,
    role: Literal["admin", "none"] = "admin",
    swarm: SwarmName = None,
    config_dir: ConfigDir = None,
    json: Json = False,
) -> None:
    """Let a member invite, remove and rotate as the operator does, or end that.

    Args:
        peer: Its peer id, or the first or last characters of it.
        role: `admin`, or `none` to end it.
        swarm: Name or id of the swarm.
        config_dir: Profile folder.
        json: Print one JSON document on standard output.
    """
    from pals.net import administration

    profile = Profile(config.config_dir(config_dir))
    administrator = await administration.open_administrator(profile, swarm, now=time.time())
    member = await administration.appoint(administrator, peer, role, now=time.time())
    if json:
        console.json({"schema": 1, "peer": member, "role": role})
    else:
        console.out(f"{member} is {'an admin' if role == 'admin' else 'no admin'}")


def export_key(file: KeyFile, /, *, swarm: SwarmName = None, config_dir: ConfigDir = None) -> None:
    """Write the operator's key to a file, to be kept elsewhere.

    Whoever has it lets machines in and removes them: keep it as you would a password.

    Args:
        file: A new file, which gets mode 0600; `-` is standard output.
        swarm: Name or id of the swarm.
        config_dir: Profile folder.
    """
    from pals.net.administration import operator_pem

    profile = Profile(config.config_dir(config_dir))
    pem = operator_pem(profile, profile.load_swarm(swarm))
    if file == STREAM:
        console.out(pem.decode(), end="")
        return
    try:
        config.create_private(file, pem)
    except OSError as error:
        raise InvalidConfig(
            source=file, problem=error.strerror or str(error), advice="name a new file"
        ) from error
    console.note(f"the operator key is in `{file}`; `pals swarm import-key` reads it")


def import_key(file: KeyFile, /, *, swarm: SwarmName = None, config_dir: ConfigDir = None) -> None:
    """Become an operator of a swarm that this machine is a member of.

    Args:
        file: What `pals swarm export-key` wrote; `-` is standard input.
        swarm: Name or id of the swarm.
        config_dir: Profile folder.
    """
    from pals.net import administration

    profile = Profile(config.config_dir(config_dir))
    entry = profile.load_swarm(swarm)
    if file == STREAM:
        pem = sys.stdin.read(MAX_KEY_CHARS).encode()
    else:
        pem = config.read_private(file, max_bytes=MAX_KEY_CHARS)
    administration.import_key(profile, entry, pem)
    console.out(f"operator of {entry.name}, swarm {entry.swarm_id}")


def describe(standing: Standing) -> dict[str, object]:
    """Return what programs are told of a swarm."""
    roster = standing.roster
    return {
        **_describe_entry(standing.entry),
        "role": standing.part,
        "members": None if roster is None else len(roster.live),
        "epoch": standing.entry.epoch if roster is None else roster.epoch,
        "list": standing.state,
        "list_age_s": None if standing.age_s is None else round(standing.age_s, 1),
        "alarms": list(standing.alarms),
        "next": standing.next_step,
    }


def _describe_entry(entry: SwarmEntry) -> dict[str, object]:
    return {
        "swarm_id": entry.swarm_id,
        "name": entry.name,
        "model": entry.model,
        "backend": entry.backend_url,
        "epoch": entry.epoch,
    }


def _is_operator(profile: Profile, entry: SwarmEntry) -> bool:
    return profile.operator_key_path(entry.swarm_id).is_file()
