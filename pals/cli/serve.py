"""`pals serve`: an OpenAI-compatible endpoint on this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import msgspec
from cyclopts import Parameter, validators

from pals import config
from pals.api.admission import Admission
from pals.api.gate import GateSettings
from pals.api.key_file import open_keys
from pals.api.openai.app import build_openai_app
from pals.api.server import HttpServer, Listener, check_public_bind, listen
from pals.api.waiting_line import LineLimits
from pals.cli import console
from pals.cli.arguments import without_option
from pals.cli.endpoint import Drive, Endpoint, open_endpoint
from pals.cli.interrupt import exiting_on_termination
from pals.cli.options import Json
from pals.cli.process import (
    NO_SERVER_OPTIONS,
    NO_SHARD_OPTIONS,
    Member,
    ServerOptions,
    ShardOptions,
    configure_logging,
    load_member,
    replace_process,
    waiting_note,
)
from pals.settings import Settings


def serve(
    *models: str,
    host: str | None = None,
    port: Annotated[int | None, Parameter(validator=validators.Number(gte=0, lte=65535))] = None,
    api_key: str | None = None,
    api_key_file: Path | None = None,
    layers: str | None = None,
    wait_for_peers: Annotated[float | None, Parameter(validator=validators.Number(gte=0))] = None,
    shard_options: ShardOptions = NO_SHARD_OPTIONS,
    options: ServerOptions = NO_SERVER_OPTIONS,
    json: Json = False,
) -> None:
    """Serve an OpenAI-compatible endpoint on this machine.

    Args:
        models: Model names or folders; the swarm's model when left out.
        host: Address to listen on; anything but loopback needs an API key.
        port: Port to listen on; 0 takes a free one.
        api_key: Key that clients must send; `PALS_API_KEY` keeps it out of the process list.
        api_key_file: File of more keys, as `pals keys create` makes them; the profile's, if it
            has one, when left out.
        layers: Also serve this range of layers of the first model to the swarm, such as
            `0:10`; `auto` chooses as many as fit, those that nobody serves first.
        wait_for_peers: Seconds that an answer waits for a peer when nobody serves the next
            layers any more; a new request waits 5 of them at most.
        shard_options: Options of the shard, with `--layers`.
        options: Options of the member.
        json: Print one JSON document a line on standard output.
    """
    configure_logging(verbose=options.verbose)
    if api_key is not None:
        _move_key_to_environment(api_key)
    key = config.take_environment(config.API_KEY_VARIABLE)
    shard_options.check_also(layers)
    settings = _with_patience(options.load_settings(), wait_for_peers)
    bind = msgspec.structs.replace(
        settings.serve,
        host=host or settings.serve.host,
        port=settings.serve.port if port is None else port,
    )
    key_file = api_key_file or (Path(bind.api_key_file) if bind.api_key_file else None)
    keys = open_keys(key, key_file, options.profile.path)
    check_public_bind(bind.host, has_keys=keys is not None)
    member = load_member(
        options.profile, options.swarm, keep={} if key is None else {config.API_KEY_VARIABLE: key}
    )
    names = models or (member.entry.model,)
    also = shard_options.make_also(names[0], layers, settings.shard, json=json)
    listener = listen(bind.host, bind.port, has_keys=keys is not None)
    gate = GateSettings.for_bind(
        listener.host, listener.port, keys=keys, hosts=bind.hosts, origins=bind.origins
    )
    drive = Drive(models=names, also=also, endpoint=listener.url)
    with exiting_on_termination(), member.profile.lock(), listener.socket:
        _serve(member, settings, drive, listener, gate, json=json)


def _with_patience(settings: Settings, wait_for_peers_s: float | None) -> Settings:
    if wait_for_peers_s is None:
        return settings
    node = msgspec.structs.replace(settings.node, wait_for_peers_s=wait_for_peers_s)
    return msgspec.structs.replace(settings, node=node)


def _move_key_to_environment(api_key: str) -> NoReturn:
    """Start again without the key in argv, where every user of the machine can read it."""
    console.warn(f"`--api-key` shows in the process list; set `{config.API_KEY_VARIABLE}` instead")
    secrets = {config.API_KEY_VARIABLE: api_key}
    if swarm_secret := config.take_environment(config.SWARM_SECRET_VARIABLE):
        secrets[config.SWARM_SECRET_VARIABLE] = swarm_secret
    replace_process(secrets, without_option(sys.argv[1:], "--api-key"))


def _serve(
    member: Member,
    settings: Settings,
    drive: Drive,
    listener: Listener,
    gate: GateSettings,
    *,
    json: bool,
) -> None:
    servers: list[HttpServer] = []

    def stop_servers() -> None:
        for server in servers:
            server.stop()

    places = settings.serve
    admission = Admission(LineLimits(running=places.max_running, waiting=places.max_waiting))
    with open_endpoint(member, settings, drive, on_crash=stop_servers) as endpoint:
        server = HttpServer(
            build_openai_app(endpoint.drivers, gate=gate, admission=admission),
            listener,
            on_ready=partial(_announce_ready, json, list(endpoint.drivers)),
            drain_s=settings.node.drain_s,
            on_leave=partial(_leave, endpoint, admission, settings.node.drain_s),
        )
        servers.append(server)
        try:
            server.run()
        finally:
            if endpoint.shard is not None and not server.is_forced:
                endpoint.shard.wait_until_left()


def _leave(endpoint: Endpoint, admission: Admission, drain_s: float) -> None:
    """Say what is waited for, and let those that wait and the shard of this node leave too."""
    admission.leave()
    if answers := admission.standing().running:
        waiting_note("1 answer" if answers == 1 else f"{answers} answers", drain_s)
    if endpoint.shard is not None:
        endpoint.shard.leave()


def _announce_ready(json: bool, models: Sequence[str], url: str) -> None:
    if json:
        document = {"event": "ready", "model": models[0], "models": models, "url": url}
        console.json({"schema": 1, **document})
        return
    console.out(f"serving {', '.join(models)} at {url}/v1")
