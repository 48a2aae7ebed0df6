"""What a run changes in the MoE layers of a model, and what it sees of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pals.models.configs.moe import RouterOverride


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRecord:
    """What the router of one layer chose in one step, for R tokens; padding is left out.

    Attributes:
        layer: Its number in the whole model.
        expert_ids: [R, A] int32, each token's best expert first.
        weights: [R, A] float32.
        load: [E] int64, how many tokens each expert got.
    """

    layer: int
    expert_ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    load: npt.NDArray[np.int64]


RoutingHook = Callable[[RoutingRecord], None]
"""Is called once for each MoE layer and step, from a thread of jax, in no order among
layers. It must not call jax. `jax.effects_barrier` waits for calls under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEOptions:
    """Fixed when a model is built.

    Attributes:
        override: Replaces the family's own routing.
        trace: Sees each layer's choices; None compiles to a program without a trace.
    """

    override: RouterOverride = field(default_factory=RouterOverride)
    trace: RoutingHook | None = None
