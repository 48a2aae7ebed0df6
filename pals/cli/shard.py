"""`pals shard`: serve a slice of a model's layers to the swarm."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import trio

from pals.cli.interrupt import raise_interrupt, run_until_signal
from pals.cli.options import Json
from pals.cli.process import (
    NO_SERVER_OPTIONS,
    NO_SHARD_OPTIONS,
    ServedRole,
    ServerOptions,
    ShardOptions,
    configure_logging,
    leaving_note,
    load_member,
    node_options,
)
from pals.types import LayerRange

if TYPE_CHECKING:
    from pals.net.node import NodeOptions


def shard(
    model: str | None = None,
    /,
    *,
    layers: str | None = None,
    shard_options: ShardOptions = NO_SHARD_OPTIONS,
    options: ServerOptions = NO_SERVER_OPTIONS,
    json: Json = False,
) -> None:
    """Serve a slice of a model's layers to the swarm.

    Args:
        model: Model name or folder; the swarm's model when left out.
        layers: Half-open range of layers, such as `0:10`; as many as fit when left out,
            those that nobody serves first.
        shard_options: Options of the shard.
        options: Options of the member.
        json: Print one JSON document a line on standard output.
    """
    configure_logging(verbose=options.verbose)
    layer_range = None if layers is None else LayerRange.parse(layers)
    settings = options.load_settings()
    member = load_member(options.profile, options.swarm)
    role = shard_options.make_role(
        model or member.entry.model, layer_range, settings.shard, json=json
    )
    with member.profile.lock():
        trio.run(_serve, node_options(member, settings), role)


async def _serve(options: NodeOptions, role: ServedRole) -> None:
    from pals.net.serving import Drain, serve_role

    drain = Drain(on_leave=partial(leaving_note, options.settings.drain_s))
    serve = partial(serve_role, options, partial(role, drain=drain))
    raise_interrupt(await run_until_signal(serve, on_signal=drain.request))
