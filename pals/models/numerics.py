# pyright: reportUnknownMemberType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""In which numbers a shard computes and keeps its weights; chosen once, at load."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from pals.models.moe_options import MoEOptions
from pals.models.spread import open_mesh
from pals.types import (
    DEFAULT_QUANTIZATION,
    ActivationDtype,
    Dtype,
    Quantization,
    activation_dtype,
)

WeightFormat = Literal["plain", "int8", "int4"]

PallasKernel = Literal["triton", "mosaic"]

AttentionKernel = Literal["xla"] | PallasKernel
"""How attention is computed; see `pals.models.kernels`."""

COMPUTE_DTYPES: dict[ActivationDtype, np.dtype] = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f32": np.dtype(np.float32),
}

WEIGHT_FORMATS: dict[Dtype, WeightFormat] = {
    "bf16": "plain",
    "f32": "plain",
    "int8": "int8",
    "int4": "int4",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """How the modules of a model are built.

    Attributes:
        compute: Dtype of hidden states, and of weights that are not quantised.
        weights: How the layers' matrices are held; routers, norms and the ends of the
            model are plain always.
        group_size: Columns that share a scale in int4.
        quantize_activations: Many rows may be rounded to int8 where that is faster.
        platform: ``cpu``, ``gpu`` or ``tpu``, for which formulations are chosen.
        attention: How layers attend that have keys and values for each key head.
        moe: What changes in MoE layers.
        mesh: The devices over which each layer is spread; None for a single one.
    """

    compute: jnp.dtype
    weights: WeightFormat = "plain"
    group_size: int = 128
    quantize_activations: bool = True
    platform: str = "cpu"
    attention: AttentionKernel = "xla"
    moe: MoEOptions = field(default_factory=MoEOptions)
    mesh: Mesh | None = None

    @classmethod
    def of(
        cls,
        dtype: Dtype,
        quantization: Quantization = DEFAULT_QUANTIZATION,
        *,
        devices: int = 1,
    ) -> Numerics:
        """Return the numerics of a shard on some of this machine's devices.

        Raises:
            TooFewDevices: There are not so many.
        """
        return cls(
            compute=COMPUTE_DTYPES[activation_dtype(dtype)],
            weights=WEIGHT_FORMATS[dtype],
            group_size=quantization.group_size,
            quantize_activations=quantization.activations,
            platform=jax.default_backend(),
            mesh=open_mesh(devices),
        )

    @property
    def devices(self) -> int:
        """Over how many devices each layer is spread."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def plain(self) -> Numerics:
        """The same without quantised weights."""
        return replace(self, weights="plain")

    @property
    def stored_kind(self) -> str:
        """What decides the numbers of quantised weights, fit for a folder's name."""
        return f"int4-{self.group_size}" if self.weights == "int4" else self.weights
