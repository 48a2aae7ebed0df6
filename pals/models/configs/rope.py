"""Reads how a model turns its queries and keys, in every spelling of transformers."""

from __future__ import annotations

import math

from pals.models.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)
from pals.models.configs.reader import MAX_POSITIONS, ConfigReader, shown

DEFAULT_THETA = 10000.0
DEFAULT_BETA_FAST = 32.0
DEFAULT_BETA_SLOW = 1.0


def read_rope(
    reader: ConfigReader, *, width: int, positions: int, theta: float = DEFAULT_THETA
) -> RopeConfig:
    """Read transformers 5's ``rope_parameters``, else 4's ``rope_theta`` and ``rope_scaling``.

    Args:
        reader: Of config.json.
        width: Dimensions of a head that turn.
        positions: ``max_position_embeddings``, from which YaRN may take its factor.
        theta: Where neither spelling names one.
    """
    old_theta = reader.number("rope_theta", default=theta)
    old = reader.table("rope_scaling")
    table = reader.table("rope_parameters") or old
    if table is None:
        return _checked_rope(reader, RopeConfig(theta=old_theta, width=width))
    return read_rope_table(table, width=width, positions=positions, theta=old_theta)


def read_rope_table(table: ConfigReader, *, width: int, positions: int, theta: float) -> RopeConfig:
    """Read one table of rotary parameters; see `read_rope`."""
    theta = table.number("rope_theta", default=theta)
    # the share of a head that turns is the family's to read; see `read_partial_width`
    table.take("partial_rotary_factor")
    scaling = _read_scaling(table, positions)
    table.refuse_unknown()
    return _checked_rope(table, RopeConfig(theta=theta, width=width, scaling=scaling))


def read_partial_width(reader: ConfigReader, head_dim: int, *, default: float) -> int:
    """Return how many dimensions of a head turn, by ``partial_rotary_factor``."""
    table = reader.table("rope_parameters") or reader.table("rope_scaling")
    factor = reader.optional_number("partial_rotary_factor")
    if table is not None and table.take("partial_rotary_factor") is not None:
        factor = table.number("partial_rotary_factor")
    factor = default if factor is None else factor
    if factor > 1:
        raise reader.corrupt(f"`partial_rotary_factor` is {factor}, more than 1")
    return int(head_dim * factor)


def _checked_rope(reader: ConfigReader, rope: RopeConfig) -> RopeConfig:
    if rope.width < 2 or rope.width % 2:
        raise reader.corrupt(f"{rope.width} dimensions of each head turn, which must be even")
    if rope.theta <= 1:
        raise reader.corrupt(f"the base of the rotary wavelengths is {rope.theta}, not above 1")
    return rope


def _read_scaling(table: ConfigReader, positions: int) -> RopeScaling | None:
    name = table.take("rope_type")
    old_name = table.take("type")
    kind = name if name is not None else old_name
    match "default" if kind is None else kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(factor=table.number("factor"))
        case "dynamic":
            _ = table.optional_integer("original_max_position_embeddings", MAX_POSITIONS)
            return DynamicScaling(factor=table.number("factor"))
        case "llama3":
            return _read_llama3(table)
        case "yarn":
            return _read_yarn(table, positions)
        case _:
            raise table.unsupported(f"rope type {shown(kind)}")


def _read_llama3(table: ConfigReader) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=table.number("factor"),
        low_freq_factor=table.number("low_freq_factor"),
        high_freq_factor=table.number("high_freq_factor"),
        original_max_position_embeddings=table.integer(
            "original_max_position_embeddings", MAX_POSITIONS
        ),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise table.corrupt("rope low_freq_factor is not below high_freq_factor")
    return scaling


def _read_yarn(table: ConfigReader, positions: int) -> YarnScaling:
    """Read YaRN; source: ``_compute_yarn_parameters`` of modeling_rope_utils.py."""
    original = table.integer("original_max_position_embeddings", MAX_POSITIONS, default=positions)
    factor = table.number("factor", default=positions / original)
    mscale = table.optional_number("mscale")
    mscale_all_dim = table.optional_number("mscale_all_dim")
    if mscale and mscale_all_dim:
        attention_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    else:
        attention_factor = yarn_mscale(factor, 1.0)
    return YarnScaling(
        factor=factor,
        attention_factor=table.number("attention_factor", default=attention_factor),
        beta_fast=table.number("beta_fast", default=DEFAULT_BETA_FAST),
        beta_slow=table.number("beta_slow", default=DEFAULT_BETA_SLOW),
        original_max_position_embeddings=original,
        truncate=table.boolean("truncate", default=True),
    )


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return the growth of attention that YaRN pairs with a context grown by ``factor``."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
