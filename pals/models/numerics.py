"""In which numbers a shard computes and keeps its weights; chosen once, at load."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pals.models.moe_options import MoEOptions
from pals.types import Dtype

COMPUTE_DTYPES: dict[Dtype, np.dtype] = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f32": np.dtype(np.float32),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """How the modules of a model are built.

    Attributes:
        compute: Dtype of hidden states, and of weights that are not quantised.
        platform: ``cpu``, ``gpu`` or ``tpu``, for which formulations are chosen.
        moe: What changes in MoE layers.
    """

    compute: jnp.dtype
    platform: str = "cpu"
    moe: MoEOptions = field(default_factory=MoEOptions)

    @classmethod
    def of(cls, dtype: Dtype) -> Numerics:
        """Return the numerics of a shard on the default device."""
        return cls(compute=COMPUTE_DTYPES[dtype], platform=jax.default_backend())
