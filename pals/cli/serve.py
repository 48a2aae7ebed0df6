"""`pals serve`: an OpenAI-compatible endpoint on this machine."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import msgspec
from cyclopts import Parameter, validators

from pals import config
from pals.api.admission import Admission
from pals.api.gate import GateSettings
from pals.api.keys import open_keys
from pals.api.openai.app import build_openai_app
from pals.api.server import HttpServer, Listener, check_public_bind, listen
from pals.api.waiting_line import LineLimits
from pals.cli import console
from pals.cli.interrupt import exiting_on_termination
from pals.cli.options import Json
from pals.cli.process import (
    NO_SERVER_OPTIONS,
    NO_SHARD_OPTIONS,
    Member,
    ServedRole,
    ServerOptions,
    ShardOptions,
    announce_leaving,
    configure_logging,
    load_member,
    node_options,
    replace_process,
)
from pals.settings import Settings
from pals.types import LayerRange

if TYPE_CHECKING:
    from pals.driver.bridge import TrioThread
    from pals.driver.local import LocalDriver
    from pals.driver.routes import ServedModel
    from pals.driver.sessions import SessionClient
    from pals.models.snapshot import Snapshot
    from pals.net.node import Node

AUTO = "auto"
LEAVE_MARGIN_S = 2.0


def serve(
    model: str | None = None,
    /,
    *,
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
        model: Model name or folder; the swarm's model when left out.
        host: Address to listen on; anything but loopback needs an API key.
        port: Port to listen on; 0 takes a free one.
        api_key: Key that clients must send; `PALS_API_KEY` keeps it out of the process list.
        api_key_file: File of more keys, as `pals keys create` makes them; the profile's, if it
            has one, when left out.
        layers: Also serve this range of layers to the swarm, such as `0:10`; `auto` chooses
            as many as fit, those that nobody serves first.
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
    layer_range = None if layers in (None, AUTO) else LayerRange.parse(layers)
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
    model = model or member.entry.model
    also = None
    if layers is not None:
        also = shard_options.make_role(model, layer_range, settings.shard, json=json)
    listener = listen(bind.host, bind.port, has_keys=keys is not None)
    gate = GateSettings.for_bind(
        listener.host, listener.port, keys=keys, hosts=bind.hosts, origins=bind.origins
    )
    with exiting_on_termination(), member.profile.lock(), listener.socket:
        _serve(member, settings, model, listener, gate, also=also, json=json)


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
    gate: GateSettings,
    *,
    also: ServedRole | None,
    json: bool,
) -> None:
    from pals.driver.bridge import TrioThread
    from pals.driver.sessions import open_sessions
    from pals.models.hub import resolve_model

    snapshot = resolve_model(model)
    served = _served_model(snapshot)
    servers: list[HttpServer] = []
    shard = None if also is None else _LeavingShard(also)

    def stop_servers() -> None:
        for server in servers:
            server.stop()

    places = settings.serve
    admission = Admission(LineLimits(running=places.max_running, waiting=places.max_waiting))
    network = TrioThread(
        partial(open_sessions, node_options(member, settings), served, serve=shard),
        on_crash=stop_servers,
    )

    def leave() -> None:
        admission.leave()
        if shard is not None:
            shard.leave(network)

    try:
        client = network.start()
        driver = _build_driver(network, client, served, snapshot)
        app = build_openai_app({driver.model_id: driver}, gate=gate, admission=admission)
        server = HttpServer(
            app,
            listener,
            on_ready=partial(_announce_ready, json, served),
            drain_s=settings.node.drain_s,
            on_terminate=leave,
        )
        servers.append(server)
        server.run()
    finally:
        if shard is not None:
            shard.wait_until_left(settings.node.drain_s)
        network.stop()
    if network.error is not None:
        raise network.error


class _LeavingShard:
    """The shard that a driver's node serves too: on SIGTERM it leaves in order."""

    def __init__(self, role: ServedRole) -> None:
        from pals.net.serving import Drain

        self._role = role
        self._drain = Drain(on_leave=announce_leaving)
        self._is_leaving = threading.Event()
        self._has_left = threading.Event()

    async def __call__(self, node: Node) -> None:
        try:
            await self._role(node, drain=self._drain)
        finally:
            self._has_left.set()

    def leave(self, network: TrioThread[SessionClient]) -> None:
        """Begin to leave; called on the main thread."""
        self._is_leaving.set()
        network.post(self._begin)

    def _begin(self) -> None:
        if not self._drain.request():  # it serves nothing yet, so nobody waits for it
            self._has_left.set()

    def wait_until_left(self, deadline_s: float) -> None:
        """Wait for it when it was asked to leave; called on the main thread."""
        if self._is_leaving.is_set():
            self._has_left.wait(deadline_s + LEAVE_MARGIN_S)


def _served_model(snapshot: Snapshot) -> ServedModel:
    from pals.driver.routes import ServedModel

    return ServedModel(
        model_id=snapshot.model_id,
        manifest=snapshot.manifest,
        num_layers=snapshot.config.num_layers,
        max_position_embeddings=snapshot.config.max_position_embeddings,
        hidden_size=snapshot.config.hidden_size,
    )


def _build_driver(
    network: TrioThread[SessionClient],
    client: SessionClient,
    served: ServedModel,
    snapshot: Snapshot,
) -> LocalDriver:
    from pals.driver.local import LocalDriver
    from pals.text.answers.format import AnswerFormat
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
        vocab_size=snapshot.config.vocab_size,
        answers=AnswerFormat.detect(snapshot.path, tokenizer),
    )


def _announce_ready(json: bool, served: ServedModel, url: str) -> None:
    if json:
        console.json({"schema": 1, "event": "ready", "model": served.model_id, "url": url})
        return
    console.out(f"serving {served.model_id} at {url}/v1")
