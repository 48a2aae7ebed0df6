"""Qwen2 and Qwen2.5 (https://arxiv.org/abs/2407.10671; modeling_qwen2.py)."""

from __future__ import annotations

from pals.models.dense import DenseLayer
from pals.models.family import Family
from pals.models.table import WeightTable

FAMILY = Family(build_layer=DenseLayer, weights=WeightTable())
