"""One shard served to the swarm: the node, the service, the compute thread, the news."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import trio

from pals.engine.batch import BatchRules
from pals.engine.batcher import Batcher
from pals.engine.compute import ComputeThread
from pals.engine.work import StepRunner
from pals.errors import LayersOutsideModel
from pals.models.config import ModelConfig
from pals.net.announce import (
    LAYER_HASH_BYTES,
    MAX_ADDRESSES,
    Announcement,
    useful_first,
)
from pals.net.announcer import Announcer
from pals.net.guiding import MaskSource
from pals.net.handback import Deliveries
from pals.net.model_shape import ModelShape
from pals.net.node import Node, NodeOptions, open_node
from pals.net.ring import SessionTable
from pals.net.shard_service import ShardService
from pals.text.grammar import TOKENIZER_NAME, GrammarMasks
from pals.types import EngineLimits, LayerRange, ShardSpec

if TYPE_CHECKING:
    from pals.engine.shard import Shard
    from pals.models.snapshot import Snapshot

OWN_RECORD_DEADLINE_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedShard:
    """A loaded and compiled shard, and what the swarm is told about it.

    Attributes:
        runner: Runs its steps.
        batcher: Plans them.
        layer_hashes: Of each layer, the hash of its source bytes that is announced.
        limits: What it was compiled for, its context no longer than its pages are.
        masks: Knows the grammars of answers, at a tail that has a tokenizer.
    """

    runner: StepRunner
    batcher: Batcher
    model_id: str
    model: ModelShape
    layers: LayerRange
    layer_hashes: tuple[bytes, ...]
    limits: EngineLimits
    masks: MaskSource | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Who is told how the loading of a shard goes on.

    Attributes:
        on_progress: What happens, in a line.
        on_download: Bytes of weights that were downloaded, and all that are to be.
    """

    on_progress: Callable[[str], None]
    on_download: Callable[[int, int], None]


def load_shard(
    model: str,
    layers: LayerRange,
    spec: ShardSpec,
    *,
    report: Report,
) -> ServedShard:
    """Read a shard's weights and compile everything that its limits allow.

    Raises:
        ModelError: The model is not there, or cannot run.
        LayersOutsideModel: The model has fewer layers.
    """
    snapshot, loaded = read_shard(model, layers, spec, report=report)
    started_s = time.perf_counter()
    programs = loaded.warmup()
    seconds = time.perf_counter() - started_s
    report.on_progress(f"compiled {len(programs)} programs in {seconds:.1f} s")
    batcher = loaded.make_batcher(snapshot.manifest, rules_of(loaded.limits))
    return ServedShard(
        runner=loaded,
        batcher=batcher,
        model_id=snapshot.model_id,
        model=ModelShape(
            manifest=snapshot.manifest,
            num_layers=snapshot.config.num_layers,
            hidden_size=snapshot.config.hidden_size,
            dtype=spec.dtype,
        ),
        layers=layers,
        layer_hashes=tuple(layer_hash[:LAYER_HASH_BYTES] for layer_hash in loaded.layer_hashes),
        limits=replace(loaded.limits, max_context_tokens=batcher.max_session_tokens),
        masks=_masks_of(snapshot) if loaded.is_tail else None,
    )


def _masks_of(snapshot: Snapshot) -> GrammarMasks | None:
    """Return what knows grammars, unless the model has no tokenizer; nothing starts yet."""
    has_tokenizer = (snapshot.path / TOKENIZER_NAME).is_file()
    return GrammarMasks.of(snapshot) if has_tokenizer else None


def read_shard(
    model: str, layers: LayerRange, spec: ShardSpec, *, report: Report
) -> tuple[Snapshot, Shard]:
    """Read a shard's weights; nothing is compiled yet.

    Raises:
        ModelError: The model is not there, or cannot run.
        LayersOutsideModel: The model has fewer layers.
    """
    # jax is imported only by a process that computes.
    from pals.engine.shard import Shard, with_cache_that_fits
    from pals.models.hub import resolve_model

    snapshot = resolve_model(model, layers, on_progress=report.on_download)
    num_layers = snapshot.config.num_layers
    if layers.stop > num_layers:
        raise LayersOutsideModel(layers=layers, num_layers=num_layers)
    limits = limits_within(spec.limits, snapshot.config)
    if limits != spec.limits:
        report.on_progress(
            f"context: {limits.max_context_tokens} tokens, the most this model takes"
        )
    report.on_progress(f"loading layers {layers} of {snapshot.model_id}")
    loaded = Shard.load(
        snapshot,
        layers,
        dtype=spec.dtype,
        limits=with_cache_that_fits(limits, snapshot.config, layers, spec),
        quantization=spec.quantization,
        devices=spec.devices,
        attention=spec.attention,
    )
    return snapshot, loaded


def rules_of(limits: EngineLimits) -> BatchRules:
    """Return what waits at a shard with these limits, and who gives way.

    What waits is bounded by its bytes, whoever's tokens they are: the windows of all sessions.
    """
    return BatchRules(
        max_sessions=limits.max_sessions,
        max_waiting_tokens=limits.max_sessions * limits.max_context_tokens,
        prefill_share=limits.prefill_share,
    )


def limits_within(limits: EngineLimits, config: ModelConfig) -> EngineLimits:
    """Return ``limits`` with no longer context than the model takes."""
    most = config.max_position_embeddings
    return replace(limits, max_context_tokens=min(limits.max_context_tokens, most))


OnReady = Callable[[Node, ServedShard], None]
"""Called once a shard is announced."""


class Drain:
    """Asks a shard to leave in order: its sessions move, and it ends.

    Args:
        on_leave: Called with the number of sessions when it begins to leave.
    """

    def __init__(self, on_leave: Callable[[int], None] = lambda _: None) -> None:
        self.on_leave = on_leave
        self._is_awaited = False
        self._requested = trio.Event()

    def request(self) -> bool:
        """Ask for it, on the trio thread; return False when no shard is served yet, or twice."""
        if not self._is_awaited or self._requested.is_set():
            return False
        self._requested.set()
        return True

    async def wait(self) -> None:
        """Wait until somebody asks."""
        self._is_awaited = True
        await self._requested.wait()


async def serve_role(options: NodeOptions, serve: Callable[[Node], Awaitable[None]]) -> None:
    """Run a node that serves until cancelled, such as by `run_shard`.

    Raises:
        RosterUnavailable: There is no verified member list.
        PortInUse: The listening address is taken.
        ModelError: The model cannot be loaded.
    """
    async with open_node(options) as node:
        await serve(node)


async def run_shard(
    node: Node, load: Callable[[], ServedShard], *, on_ready: OnReady, drain: Drain | None = None
) -> None:
    """Serve a shard on a running node until cancelled, or until it has left in order.

    Args:
        node: The member that serves.
        load: Loads and compiles the shard, in a thread. The network is up before, so
            that a refused member or a taken port costs no minutes.
        on_ready: Called once the shard is announced.
        drain: Asks it to leave.

    Raises:
        ModelError: The model cannot be loaded.
    """
    node.nursery.start_soon(_look_up_own_record, node)
    shard = await trio.to_thread.run_sync(load, abandon_on_cancel=True)
    table = SessionTable(
        local=node.peer_id,
        layers=shard.layers,
        num_layers=shard.model.num_layers,
        limits=shard.limits,
        idle_s=node.options.settings.session_idle_s,
    )
    service = ShardService(node.links, table, shard.model, node.nursery, masks=shard.masks)
    deliveries = Deliveries()
    compute = ComputeThread(
        shard.runner,
        shard.batcher,
        deliveries.deliver,
        max_queued_bytes=service.max_queued_bytes,
    )
    compute.start()
    try:
        service.attach(compute)
        node.add_role(service)
        node.nursery.start_soon(service.expire_sessions)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(deliveries.run, service.on_delivery)
            nursery.start_soon(service.guides.run)
            await _announce_until_left(node, shard, service, on_ready, drain or Drain())
            nursery.cancel_scope.cancel()
    finally:
        compute.close()
        deliveries.close()
        service.guides.stop()


async def _look_up_own_record(node: Node) -> None:
    """Learn the number that a process before reached; its clock may have been ahead."""
    await node.discovery.find((node.peer_id,), deadline_s=OWN_RECORD_DEADLINE_S)


async def _announce_until_left(
    node: Node, shard: ServedShard, service: ShardService, on_ready: OnReady, drain: Drain
) -> None:
    describe = partial(_describe, node, shard, service)
    announcer = Announcer(node.discovery, node.options.identity, describe)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(announcer.run, partial(on_ready, node, shard))
        await drain.wait()
        drain.on_leave(service.sessions)
        announcer.drain()
        with trio.move_on_after(node.options.settings.drain_s):
            await service.drain()
        nursery.cancel_scope.cancel()
    await announcer.withdraw()


def _describe(node: Node, shard: ServedShard, service: ShardService) -> Announcement:
    return Announcement(
        peer=node.peer_id,
        model_id=shard.model_id,
        manifest=shard.model.manifest,
        layers=shard.layers,
        num_layers=shard.model.num_layers,
        layer_hashes=shard.layer_hashes,
        dtype=shard.model.dtype,
        free_tokens=service.free_tokens,
        max_context_tokens=shard.limits.max_context_tokens,
        step_ms=service.step_ms,
        addresses=useful_first(node.host.addresses())[:MAX_ADDRESSES],
        seq=0,
        expires_at=0.0,
    )
