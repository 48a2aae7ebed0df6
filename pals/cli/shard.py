"""`pals shard`: serve a slice of a model's layers to the swarm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import trio

from pals.cli.interrupt import raise_interrupt, run_until_signal
from pals.cli.options import Json
from pals.cli.process import (
    NO_SERVER_OPTIONS,
    NO_SHARD_OPTIONS,
    ServerOptions,
    ShardOptions,
    announce_shard,
    configure_logging,
    load_member,
    node_options,
)
from pals.types import LayerRange

if TYPE_CHECKING:
    from pals.net.node import NodeOptions
    from pals.net.serving import ServedShard


def shard(
    model: str | None = None,
    /,
    *,
    layers: str,
    shard_options: ShardOptions = NO_SHARD_OPTIONS,
    options: ServerOptions = NO_SERVER_OPTIONS,
    json: Json = False,
) -> None:
    """Serve a slice of a model's layers to the swarm.

    Args:
        model: Model name or folder; the swarm's model when left out.
        layers: Half-open range of layers, such as `0:10`.
        shard_options: Options of the shard.
        options: Options of the member.
        json: Print one JSON document a line on standard output.
    """
    configure_logging(verbose=options.verbose)
    layer_range = LayerRange.parse(layers)
    settings = options.load_settings()
    member = load_member(options.profile)
    load = shard_options.make_loader(model or member.entry.model, layer_range, settings.shard)
    with member.profile.lock():
        trio.run(_serve, node_options(member, settings), load, json)


async def _serve(options: NodeOptions, load: Callable[[], ServedShard], json: bool) -> None:
    from pals.net.serving import serve_shard

    on_ready = partial(announce_shard, json)
    raise_interrupt(await run_until_signal(partial(serve_shard, options, load, on_ready=on_ready)))
