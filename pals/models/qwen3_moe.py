"""Qwen3 MoE (https://arxiv.org/abs/2505.09388; transformers: modeling_qwen3_moe.py)."""

from __future__ import annotations

from pals.models.family import Family
from pals.models.moe import SparseLayer
from pals.models.table import Fused, PerExpert, WeightTable

FAMILY = Family(
    build_layer=SparseLayer,
    weights=WeightTable(
        layer={
            "mlp.experts.gate_up_proj.weight": (
                PerExpert("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
                Fused("mlp.experts.gate_up_proj"),
            ),
            "mlp.experts.down_proj.weight": (
                PerExpert("mlp.experts.{}.down_proj.weight"),
                Fused("mlp.experts.down_proj"),
            ),
        }
    ),
)
"""The second spelling is that of transformers 5's modules, in state dicts saved directly."""
