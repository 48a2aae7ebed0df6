"""Qwen3 (https://arxiv.org/abs/2505.09388; transformers: modeling_qwen3.py)."""

from __future__ import annotations

from pals.models.dense import DenseLayer
from pals.models.family import Family
from pals.models.table import WeightTable

FAMILY = Family(build_layer=DenseLayer, weights=WeightTable())
