"""`pals login`."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Sequence

from pals import config
from pals.cli import console
from pals.cli.options import ConfigDir, Json
from pals.errors import InvalidInvite, SecretOnCommandLine


async def login(*arguments: str, config_dir: ConfigDir = None, json: Json = False) -> None:
    """Join a swarm with an invite from `PALS_INVITE` or standard input.

    Args:
        arguments: None: other users of the machine could read an invite given here.
        config_dir: Profile folder.
        json: Print one JSON document on standard output.
    """
    invite = read_invite(arguments)
    from pals.net.enrolment import redeem_invite

    entry = await redeem_invite(config.Profile(config.config_dir(config_dir)), invite)
    if json:
        document = {"swarm_id": entry.swarm_id, "name": entry.name, "model": entry.model}
        console.json({"schema": 1, **document})
        return
    console.out(f"joined {entry.name}, swarm {entry.swarm_id}")
    console.note(f"next: `pals shard {entry.model}` to serve layers, or `pals serve`")


def read_invite(arguments: Sequence[str]) -> str:
    """Return the invite from `PALS_INVITE` or standard input.

    Raises:
        SecretOnCommandLine: There are arguments: other users could read an invite there.
        InvalidInvite: There is none.
    """
    if arguments:
        raise SecretOnCommandLine(name="an invite", variable=config.INVITE_VARIABLE)
    return config.take_environment(config.INVITE_VARIABLE) or _ask()


def _ask() -> str:
    """Read the invite without showing it, or from a pipe."""
    if sys.stdin.isatty():
        return getpass.getpass("Invite: ")
    # Far more than an invite has: a longer text is refused by its length.
    text = sys.stdin.read(64 << 10)
    if not text.strip():
        raise InvalidInvite(problem=f"`{config.INVITE_VARIABLE}` and standard input are empty")
    return text
