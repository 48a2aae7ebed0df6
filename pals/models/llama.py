"""Llama (https://arxiv.org/abs/2302.13971; transformers: modeling_llama.py)."""

from __future__ import annotations

from pals.models.dense import DenseLayer
from pals.models.family import Family
from pals.models.table import WeightTable

FAMILY = Family(build_layer=DenseLayer, weights=WeightTable())
