"""Mistral (https://arxiv.org/abs/2310.06825; transformers: modeling_mistral.py)."""

from __future__ import annotations

from pals.models.dense import DenseLayer
from pals.models.family import Family
from pals.models.table import WeightTable

FAMILY = Family(build_layer=DenseLayer, weights=WeightTable())
