"""gpt-oss (https://arxiv.org/abs/2508.10925; transformers: modeling_gpt_oss.py).

OpenAI publishes the experts' matrices as MXFP4, each expert's as [out, in]; transformers
computes with bf16, each as [in, out], and saves them so. In both, the rows of gate and
up alternate.
"""

from __future__ import annotations

import numpy as np

from pals.models.family import Family
from pals.models.moe import SparseLayer
from pals.models.table import Array, Fused, Named, WeightTable, transpose


def gates_above_ups(block: Array) -> Array:
    """Return [2 F, ...], whose rows are gate and up in turn, with all gates first."""
    return np.concatenate([block[0::2], block[1::2]])


def transposed_gates_above_ups(block: Array) -> Array:
    """Return the [2 F, D] of a matrix [D, 2 F], whose columns are gate and up in turn."""
    return gates_above_ups(block.T)


FAMILY = Family(
    build_layer=SparseLayer,
    weights=WeightTable(
        layer={
            "mlp.gate.weight": (Named("mlp.router.weight"),),
            "mlp.gate.bias": (Named("mlp.router.bias"),),
            "mlp.experts.gate_up_proj.weight": (
                Fused("mlp.experts.gate_up_proj_blocks", change=gates_above_ups),
                Fused(
                    "mlp.experts.gate_up_proj", transposed=True, change=transposed_gates_above_ups
                ),
            ),
            "mlp.experts.gate_up_proj.bias": (
                Fused("mlp.experts.gate_up_proj_bias", change=gates_above_ups),
            ),
            "mlp.experts.down_proj.weight": (
                Fused("mlp.experts.down_proj_blocks"),
                Fused("mlp.experts.down_proj", transposed=True, change=transpose),
            ),
            "mlp.experts.down_proj.bias": (Fused("mlp.experts.down_proj_bias"),),
        }
    ),
)
