"""A family's modules and weights, found by the name that its config has."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from pals.models.config import ModelConfig
from pals.models.decoder import DecoderLayer
from pals.models.numerics import Numerics
from pals.models.table import WeightTable

Config = TypeVar("Config", bound=ModelConfig)


@dataclass(frozen=True, kw_only=True)
class Family(Generic[Config]):
    """What a family's file in `pals.models` defines as ``FAMILY``.

    Attributes:
        build_layer: Makes the layer of a number.
        weights: Where a checkpoint keeps the layer's parameters.
    """

    build_layer: Callable[[Config, int, Numerics], DecoderLayer]
    weights: WeightTable


def family_of(config: ModelConfig) -> Family[ModelConfig]:
    """Return the family of a checked config."""
    family: Family[ModelConfig] = importlib.import_module(f"pals.models.{config.family}").FAMILY
    return family
