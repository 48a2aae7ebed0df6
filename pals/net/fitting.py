"""A shard whose layers are chosen: as many as fit here, those that the swarm lacks first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pals.engine.memory import Memory, find_memory, format_bytes
from pals.errors import ModelTooLarge
from pals.net.announce import Announcement
from pals.net.node import Node
from pals.net.placement import choose_range, explain_choice
from pals.net.serving import (
    Drain,
    OnReady,
    Report,
    ServedShard,
    limits_within,
    load_shard,
    run_shard,
)
from pals.types import LayerRange, ShardSpec, activation_dtype

LOOK_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FittingShard:
    """What to serve when no layers were named.

    Attributes:
        model: Its name or folder.
        spec: How to hold them.
        memory: What it has to fit into; None for what this machine has.
        report: Told what happens.
    """

    model: str
    spec: ShardSpec
    memory: Memory | None
    report: Report

    def load(self, announced: Sequence[Announcement]) -> ServedShard:
        """Choose the layers beside what others announce, and load them.

        Raises:
            ModelError: The model is not there, or cannot run.
            ModelTooLarge: Not even one layer fits.
        """
        layers = self._choose(announced)
        return load_shard(self.model, layers, self.spec, report=self.report)

    def _choose(self, announced: Sequence[Announcement]) -> LayerRange:
        # jax is imported only by a process that computes.
        from pals.engine.plan import plan_model
        from pals.models.hub import resolve_model

        snapshot = resolve_model(self.model)
        config = snapshot.config
        spec = replace(self.spec, limits=limits_within(self.spec.limits, config))
        plan = plan_model(config, spec)
        memory = self.memory or find_memory(spec.devices)
        others = [
            a
            for a in announced
            if a.manifest == snapshot.manifest
            and activation_dtype(a.dtype) == activation_dtype(spec.dtype)
        ]
        chosen = choose_range(
            [a.layers for a in others],
            config.num_layers,
            lambda start: plan.layers_that_fit(memory.size_bytes, start=start),
        )
        if chosen is None:
            needed = plan.plan_range(LayerRange(0, 1)).needed
            raise ModelTooLarge(
                model=snapshot.model_id, memory=str(memory), needed=format_bytes(needed)
            )
        self.report.on_progress(explain_choice(chosen, others, config.num_layers, str(memory)))
        return chosen


async def run_fitting_shard(
    node: Node, shard: FittingShard, *, on_ready: OnReady, drain: Drain | None = None
) -> None:
    """Look what the swarm serves, choose, load, and serve as `run_shard` does.

    Raises:
        ModelError: The model cannot be loaded.
        ModelTooLarge: Not even one layer fits.
    """
    others = node.members() - {node.peer_id}
    announced = await node.discovery.find(others, deadline_s=LOOK_DEADLINE_S)
    found = [announced[peer] for peer in sorted(announced)]
    found = [a for a in found if a.state == "serving"]
    await run_shard(node, lambda: shard.load(found), on_ready=on_ready, drain=drain)
