"""Shards that choose their layers: three machines that are told none make a chain."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import trio

from pals.engine.memory import Memory
from pals.engine.plan import plan_model
from pals.errors import ModelTooLarge
from pals.models.snapshot import Snapshot
from pals.net.fitting import FittingShard, run_fitting_shard
from pals.net.node import Node
from pals.net.serving import Report, ServedShard, serve_role
from pals.types import LayerRange, ShardSpec
from tests.integration.swarm import (
    DEADLINE_S,
    TestSwarm,
    ask,
    make_swarm,
    open_client,
    request,
    start_shard,
)

pytestmark = [pytest.mark.trio, pytest.mark.timeout(180)]


def memory_for(swarm: TestSwarm, *ranges: str) -> Memory:
    """Return the memory into which the largest of some shards just fits."""
    config = Snapshot.open(swarm.checkpoint, "m").config
    plan = plan_model(config, ShardSpec(dtype="f32", limits=swarm.limits))
    return Memory(size_bytes=max(plan.plan_range(LayerRange.parse(r)).needed for r in ranges))


def fitting(swarm: TestSwarm, memory: Memory, notes: list[str]) -> FittingShard:
    return FittingShard(
        model=str(swarm.checkpoint),
        spec=ShardSpec(dtype="f32", limits=swarm.limits),
        memory=memory,
        report=Report(on_progress=notes.append, on_download=lambda *_: None),
    )


async def start_fitting(
    nursery: trio.Nursery, swarm: TestSwarm, number: int, memory: Memory, notes: list[str]
) -> LayerRange:
    """Serve what fits on one of the peers; return the layers once they are announced."""
    ready, chosen = trio.Event(), list[LayerRange]()

    def on_ready(_: Node, served: ServedShard) -> None:
        chosen.append(served.layers)
        ready.set()

    role = partial(run_fitting_shard, shard=fitting(swarm, memory, notes), on_ready=on_ready)
    nursery.start_soon(serve_role, swarm.options(swarm.peers[number]), role)
    with trio.fail_after(DEADLINE_S):
        await ready.wait()
    return chosen[0]


async def test_machines_that_are_told_no_layers_fill_the_gaps_and_answer(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    notes: list[str] = []
    async with make_swarm(tmp_path) as swarm:
        await start_shard(nursery, swarm, swarm.options(swarm.peers[0]), "2:4")
        memory = memory_for(swarm, "0:2", "4:6")

        second = await start_fitting(nursery, swarm, 1, memory, notes)
        third = await start_fitting(nursery, swarm, 2, memory, notes)
        async with open_client(swarm) as client:
            tokens = await (await ask(client, request([5, 9, 200]))).all_tokens()
        nursery.cancel_scope.cancel()

    assert {str(second), str(third)} == {"0:2", "4:6"}
    assert len(tokens) == 12
    reasons = [note for note in notes if note.startswith("layers ")]
    assert all("2:4 is served by" in reason for reason in reasons)
    assert all(f"2 layers fit in {memory}" in reason for reason in reasons)


async def test_a_machine_too_small_for_one_layer_is_refused_by_its_size(tmp_path: Path) -> None:
    async with make_swarm(tmp_path) as swarm:
        shard = fitting(swarm, Memory(size_bytes=1 << 20), [])
        with pytest.raises(ModelTooLarge) as caught:
            await trio.to_thread.run_sync(shard.load, [])

    assert caught.value.fields["memory"] == "1 MiB"
