"""GLM-4.5 and 4.6 (https://arxiv.org/abs/2508.06471; transformers: modeling_glm4_moe.py)."""

from __future__ import annotations

from pals.models.family import Family
from pals.models.moe import SPARSE_WEIGHTS, SparseLayer

FAMILY = Family(build_layer=SparseLayer, weights=SPARSE_WEIGHTS)
