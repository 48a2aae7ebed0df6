"""Qwen3 MoE (https://arxiv.org/abs/2505.09388; transformers: modeling_qwen3_moe.py)."""

from __future__ import annotations

from pals.models.family import Family
from pals.models.moe import SPARSE_WEIGHTS, SparseLayer

FAMILY = Family(build_layer=SparseLayer, weights=SPARSE_WEIGHTS)
