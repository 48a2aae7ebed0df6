"""gpt-oss (https://arxiv.org/abs/2508.10925; transformers: modeling_gpt_oss.py)."""

from __future__ import annotations

import numpy as np

from pals.models.family import Family
from pals.models.moe import SparseLayer
from pals.models.table import Array, Fused, Named, WeightTable, transpose


def gates_above_ups(block: Array) -> Array:
    """Sort the last axis of [..., 2 F], where gate and up alternate, and put it first.

    Returns:
        [2 F, ...], the gates' rows above those of up.
    """
    return np.concatenate([block[..., 0::2], block[..., 1::2]], axis=-1).T


FAMILY = Family(
    build_layer=SparseLayer,
    weights=WeightTable(
        layer={
            "mlp.gate.weight": (Named("mlp.router.weight"),),
            "mlp.gate.bias": (Named("mlp.router.bias"),),
            "mlp.experts.gate_up_proj.weight": (
                Fused("mlp.experts.gate_up_proj", change=gates_above_ups),
            ),
            "mlp.experts.gate_up_proj.bias": (
                Fused("mlp.experts.gate_up_proj_bias", change=gates_above_ups),
            ),
            "mlp.experts.down_proj.weight": (Fused("mlp.experts.down_proj", change=transpose),),
            "mlp.experts.down_proj.bias": (Fused("mlp.experts.down_proj_bias"),),
        }
    ),
)
