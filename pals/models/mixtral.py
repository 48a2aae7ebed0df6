"""Mixtral (https://arxiv.org/abs/2401.04088; transformers: modeling_mixtral.py)."""

from __future__ import annotations

from pals.models.family import Family
from pals.models.moe import SparseLayer
from pals.models.table import Fused, Named, PerExpert, WeightTable

FAMILY = Family(
    build_layer=SparseLayer,
    weights=WeightTable(
        layer={
            "mlp.gate.weight": (Named("block_sparse_moe.gate.weight"), Named("mlp.gate.weight")),
            "mlp.experts.gate_up_proj.weight": (
                PerExpert(
                    "block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"
                ),
                Fused("mlp.experts.gate_up_proj"),
            ),
            "mlp.experts.down_proj.weight": (
                PerExpert("block_sparse_moe.experts.{}.w2.weight"),
                Fused("mlp.experts.down_proj"),
            ),
        }
    ),
)
"""The second spelling is that of transformers 5's modules, in state dicts saved directly."""
