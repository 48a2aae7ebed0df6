"""DeepSeek V3 and Kimi K2 (https://arxiv.org/abs/2412.19437; modeling_deepseek_v3.py)."""

from __future__ import annotations

from pals.models.family import Family
from pals.models.moe import SPARSE_WEIGHTS, SparseLayer

FAMILY = Family(build_layer=SparseLayer, weights=SPARSE_WEIGHTS)
