"""`pals shard`: serve a slice of a model's layers to the swarm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated

import trio
from cyclopts import Parameter, validators

from pals import config
from pals.cli import console
from pals.cli.interrupt import run_until_signal
from pals.cli.options import Json
from pals.cli.process import (
    NO_SERVER_OPTIONS,
    ServerOptions,
    Threads,
    configure_logging,
    load_member,
    node_options,
)
from pals.config import ShardSettings
from pals.types import Dtype, EngineLimits, LayerRange

if TYPE_CHECKING:
    from pals.net.node import Node, NodeOptions
    from pals.net.serving import ServedShard

_Count = Annotated[int | None, Parameter(validator=validators.Number(gte=1))]


def shard(
    model: str | None = None,
    /,
    *,
    layers: str,
    dtype: Dtype | None = None,
    context: _Count = None,
    sessions: _Count = None,
    threads: Threads = None,
    options: ServerOptions = NO_SERVER_OPTIONS,
    json: Json = False,
) -> None:
    """Serve a slice of a model's layers to the swarm.

    Args:
        model: Model name or folder; the swarm's model when left out.
        layers: Half-open range of layers, such as `0:10`.
        dtype: `bf16`, or `f32` for comparisons.
        context: Most tokens of one session.
        sessions: Most sessions at one time.
        threads: Compute threads; every core when left out.
        options: Options of the member.
        json: Print one JSON document a line on standard output.
    """
    # The network and the engine are imported once the options are known to be right.
    from pals.net.serving import load_shard

    configure_logging(verbose=options.verbose)
    layer_range = LayerRange.parse(layers)
    settings = options.load_settings()
    member = load_member(options.profile)
    config.limit_compute_threads(threads)
    load = partial(
        load_shard,
        model or member.entry.model,
        layer_range,
        dtype or settings.shard.dtype,
        _limits(settings.shard, context=context, sessions=sessions),
        on_progress=console.note,
    )
    with member.profile.lock():
        trio.run(_serve, node_options(member, settings), load, json)


def _limits(settings: ShardSettings, *, context: int | None, sessions: int | None) -> EngineLimits:
    return EngineLimits(
        max_sessions=sessions or settings.max_sessions,
        max_context_tokens=context or settings.max_context_tokens,
        max_chunk_tokens=settings.max_chunk_tokens,
    )


async def _serve(options: NodeOptions, load: Callable[[], ServedShard], json: bool) -> None:
    from pals.net.serving import serve_shard

    on_ready = partial(_announce_ready, json)
    await run_until_signal(partial(serve_shard, options, load, on_ready=on_ready))


def _announce_ready(json: bool, node: Node, served: ServedShard) -> None:
    addresses = node.host.addresses()
    if json:
        console.json(
            {
                "schema": 1,
                "event": "ready",
                "peer": node.peer_id,
                "layers": str(served.layers),
                "addresses": addresses,
            }
        )
        return
    console.out(f"serving layers {served.layers} of {served.model_id} as peer {node.peer_id}")
    for address in addresses:
        console.out(f"address {address}")
