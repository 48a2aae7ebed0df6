"""`pals serve`: an OpenAI-compatible endpoint on this machine."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, NoReturn

import msgspec
from cyclopts import Parameter, validators

from pals import config
from pals.api.gate import GateSettings
from pals.api.openai.app import build_openai_app
from pals.api.server import HttpServer, Listener, check_public_bind, listen
from pals.cli import console
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
    node_options,
    replace_process,
)
from pals.config import Settings
from pals.types import LayerRange

if TYPE_CHECKING:
    from pals.driver.bridge import TrioThread
    from pals.driver.local import LocalDriver
    from pals.driver.routes import ServedModel
    from pals.driver.sessions import SessionClient
    from pals.models.snapshot import Snapshot
    from pals.net.node import Node

AUTO = "auto"


def serve(
    model: str | None = None,
    /,
    *,
    host: str | None = None,
    port: Annotated[int | None, Parameter(validator=validators.Number(gte=0, lte=65535))] = None,
    api_key: str | None = None,
    layers: str | None = None,
    shard_options: ShardOptions = NO_SHARD_OPTIONS,
    options: ServerOptions = NO_SERVER_OPTIONS,
    json: Json = False,
) -> None:
    """Serve an OpenAI-compatible endpoint on this machine.

    Args:
        model: Model name or folder; the swarm's model when left out.
        host: Address to listen on; anything but loopback needs an API key.
        port: Port to listen on; 0 takes a free one.
        api_key: Key that clients must send; `PALS_API_KEY` keeps it out of the process list.
        layers: Also serve this range of layers to the swarm, such as `0:10`; `auto` chooses
            as many as fit, those that nobody serves first.
        shard_options: Options of the shard, with `--layers`.
        options: Options of the member.
        json: Print one JSON document a line on standard output.
    """
    configure_logging(verbose=options.verbose)
    if api_key is not None:
        _move_key_to_environment(api_key)
    key = config.take_environment(config.API_KEY_VARIABLE)
    layer_range = None if layers in (None, AUTO) else LayerRange.parse(layers)
    settings = options.load_settings()
    bind = msgspec.structs.replace(
        settings.serve,
        host=host or settings.serve.host,
        port=settings.serve.port if port is None else port,
    )
    check_public_bind(bind.host, key)
    member = load_member(
        options.profile, keep={} if key is None else {config.API_KEY_VARIABLE: key}
    )
    model = model or member.entry.model
    also = None
    if layers is not None:
        also = shard_options.make_role(model, layer_range, settings.shard, json=json)
    listener = listen(bind.host, bind.port, api_key=key)
    with exiting_on_termination(), member.profile.lock(), listener.socket:
        _serve(member, settings, model, listener, key, also=also, json=json)


def _move_key_to_environment(api_key: str) -> NoReturn:
    """Start again without the key in argv, where every user of the machine can read it."""
    console.warn(f"`--api-key` shows in the process list; set `{config.API_KEY_VARIABLE}` instead")
    secrets = {config.API_KEY_VARIABLE: api_key}
    if swarm_secret := config.take_environment(config.SWARM_SECRET_VARIABLE):
        secrets[config.SWARM_SECRET_VARIABLE] = swarm_secret
    replace_process(secrets, without_option(sys.argv[1:], "--api-key"))


def without_option(arguments: Sequence[str], option: str) -> list[str]:
    """Return command-line arguments without an option and its value."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if name.replace("_", "-") != option:  # cyclopts takes `--api_key` for `--api-key`
            kept.append(argument)
        elif not equals:
            next(rest, None)
    return kept


def _serve(
    member: Member,
    settings: Settings,
    model: str,
    listener: Listener,
    api_key: str | None,
    *,
    also: Callable[[Node], Awaitable[None]] | None,
    json: bool,
) -> None:
    from pals.driver.bridge import TrioThread
    from pals.driver.sessions import open_sessions
    from pals.models.hub import resolve_model

    snapshot = resolve_model(model)
    served = _served_model(snapshot)
    servers: list[HttpServer] = []

    def stop_servers() -> None:
        for server in servers:
            server.stop()

    network = TrioThread(
        partial(open_sessions, node_options(member, settings), served, serve=also),
        on_crash=stop_servers,
    )
    try:
        client = network.start()
        driver = _build_driver(network, client, served, snapshot, settings)
        gate = GateSettings.for_bind(listener.host, listener.port, api_key=api_key)
        app = build_openai_app(driver, gate=gate)
        servers.append(HttpServer(app, listener, on_ready=partial(_announce_ready, json, served)))
        servers[0].run()
    finally:
        network.stop()
    if network.error is not None:
        raise network.error


def _served_model(snapshot: Snapshot) -> ServedModel:
    from pals.driver.routes import ServedModel

    return ServedModel(
        model_id=snapshot.model_id,
        manifest=snapshot.manifest,
        num_layers=snapshot.config.num_layers,
        max_position_embeddings=snapshot.config.max_position_embeddings,
    )


def _build_driver(
    network: TrioThread[SessionClient],
    client: SessionClient,
    served: ServedModel,
    snapshot: Snapshot,
    settings: Settings,
) -> LocalDriver:
    from pals.driver.local import LocalDriver
    from pals.text.child import TextChild
    from pals.text.template import ChatTemplate
    from pals.text.tokenizer import Tokenizer

    child = TextChild()
    tokenizer = Tokenizer.load(snapshot.path, child)
    return LocalDriver(
        network,
        client,
        served,
        tokenizer,
        ChatTemplate.load(snapshot.path, child),
        eos_token_ids=tokenizer.eos_token_ids.union(snapshot.config.eos_token_ids),
        step_deadline_s=settings.node.step_deadline_s,
    )


def _announce_ready(json: bool, served: ServedModel, url: str) -> None:
    if json:
        console.json({"schema": 1, "event": "ready", "model": served.model_id, "url": url})
        return
    console.out(f"serving {served.model_id} at {url}/v1")
