"""`pals create` and `pals join`: into a swarm, and serve layers, in one command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

import trio

from pals import config
from pals.cli import console
from pals.cli.arguments import without_option
from pals.cli.login import read_invite
from pals.cli.options import Json
from pals.cli.process import (
    NO_SERVER_OPTIONS,
    NO_SHARD_OPTIONS,
    ServerOptions,
    ShardOptions,
    configure_logging,
    replace_process,
)
from pals.cli.swarm import OWN_BACKEND, make_swarm
from pals.config import SwarmEntry, SwarmSecret
from pals.errors import InvalidConfig
from pals.types import LayerRange

OWN_OPTIONS = ("--name", "--backend")
"""What `pals shard` is not told."""


def create(
    model: str,
    /,
    *,
    name: str = "my-swarm",
    backend: str = OWN_BACKEND,
    layers: str | None = None,
    shard_options: ShardOptions = NO_SHARD_OPTIONS,
    options: ServerOptions = NO_SERVER_OPTIONS,
    json: Json = False,
) -> None:
    """Make a swarm for a model, become its operator, and serve layers of the model.

    It is `pals swarm create` and then `pals shard`; a start after that is `pals shard` alone.

    Args:
        model: Model name or folder.
        name: What people call the swarm.
        backend: Address of the membership backend; `p2p` keeps it in this profile.
        layers: Half-open range of layers, such as `0:10`; as many as fit when left out.
        shard_options: Options of the shard.
        options: Options of the member.
        json: Print one JSON document a line on standard output.
    """
    configure_logging(verbose=options.verbose)
    _check(layers, shard_options, options)
    from pals.models.lookup import load_config

    load_config(model)  # a swarm for a model that nobody can run is of no use
    _refuse_second(options, name)
    entry = trio.run(partial(make_swarm, options.profile, name=name, model=model, backend=backend))
    _announce("created", entry, json=json)
    if not json:
        console.note("next: `pals invite create` in another terminal, for every other machine")
    _become_shard(entry, sys.argv[2:])


def join(
    *arguments: str,
    layers: str | None = None,
    shard_options: ShardOptions = NO_SHARD_OPTIONS,
    options: ServerOptions = NO_SERVER_OPTIONS,
    json: Json = False,
) -> None:
    """Join a swarm with an invite from `PALS_INVITE` or standard input, and serve layers.

    It is `pals login` and then `pals shard`; a start after that is `pals shard` alone.

    Args:
        arguments: None: other users of the machine could read an invite given here.
        layers: Half-open range of layers, such as `0:10`; as many as fit when left out.
        shard_options: Options of the shard.
        options: Options of the member.
        json: Print one JSON document a line on standard output.
    """
    configure_logging(verbose=options.verbose)
    invite = read_invite(arguments)
    _check(layers, shard_options, options)
    from pals.net.enrolment import redeem_invite

    entry = trio.run(redeem_invite, options.profile, invite)
    _announce("joined", entry, json=json)
    _become_shard(entry, sys.argv[2:])


def _check(layers: str | None, shard_options: ShardOptions, options: ServerOptions) -> None:
    """Refuse what the shard would refuse, before anything is made."""
    if options.swarm is not None:
        raise InvalidConfig(
            source="--swarm", problem="the swarm is the new one", advice="leave it out"
        )
    shard_options.check_memory(None if layers is None else LayerRange.parse(layers))
    options.load_settings()
    if options.profile.path.is_dir():
        with options.profile.lock():  # the shard could not start while another process runs
            pass


def _refuse_second(options: ServerOptions, name: str) -> None:
    """Refuse a second swarm of a name: the command was meant to start the first again."""
    if not options.profile.path.is_dir():
        return
    for entry in options.profile.load_swarms():
        if entry.name == name:
            raise InvalidConfig(
                source="--name",
                problem=f"this profile has a swarm `{name}` already",
                advice=f"run `pals shard {entry.model}` to serve it, or choose another `--name`",
            )


def _announce(event: str, entry: SwarmEntry, *, json: bool) -> None:
    if json:
        document = {"swarm_id": entry.swarm_id, "name": entry.name, "model": entry.model}
        console.json({"schema": 1, "event": event, **document})
    else:
        console.out(f"{event} {entry.name}, swarm {entry.swarm_id}")


def _become_shard(entry: SwarmEntry, arguments: Sequence[str]) -> NoReturn:
    """Go on as `pals shard`, as if that had been typed."""
    rest = list(arguments)
    for option in OWN_OPTIONS:
        rest = without_option(rest, option)
    secret = SwarmSecret.parse(entry.swarm_secret)
    variables = {config.SWARM_SECRET_VARIABLE: secret.to_text()}
    # before what was typed, where a `--` may end the options
    replace_process(variables, ["shard", "--swarm", entry.swarm_id, *rest])
