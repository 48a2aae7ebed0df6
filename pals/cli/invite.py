"""`pals invite`: let another machine in."""

from __future__ import annotations

import time
from urllib.parse import urlsplit

from pals import config
from pals.cli import console
from pals.cli.options import ConfigDir, Json

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})


async def create(
    *,
    max_uses: int = 1,
    expires_hours: float | None = None,
    note: str = "",
    backend: str | None = None,
    config_dir: ConfigDir = None,
    json: Json = False,
) -> None:
    """Make an invite and print the command that the other machine runs.

    The invite holds the swarm's secret: hand it over as you would a password.

    Args:
        max_uses: Machines it lets in.
        expires_hours: Hours until it lets nobody in; never when left out.
        note: A reminder that members and the backend can read.
        backend: Address of the backend as the other machine reaches it.
        config_dir: Profile folder.
        json: Print one JSON document on standard output.
    """
    from pals.net.enrolment import create_invite

    profile = config.Profile(config.config_dir(config_dir))
    text = await create_invite(
        profile,
        max_uses=max_uses,
        expires_hours=expires_hours,
        note=note,
        backend_url=backend,
        now=time.time(),
    )
    address = backend or profile.load_swarm().backend_url
    command = f"{config.INVITE_VARIABLE}={text} pals login"
    if json:
        console.json({"schema": 1, "invite": text, "command": command, "backend": address})
    else:
        console.out(command)
    _warn_of_loopback(address)


def _warn_of_loopback(address: str) -> None:
    if urlsplit(address).hostname in LOOPBACK_HOSTS:
        console.warn(
            f"the invite names the backend `{address}`, which only this machine reaches; "
            "for another machine give its address with `--backend`"
        )
