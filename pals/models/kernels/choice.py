"""Which attention a shard uses: chosen once at load, and for all of its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from pals.errors import InvalidConfig
from pals.models.config import AttentionConfig, LatentAttentionConfig
from pals.models.kernels.trial import try_kernel
from pals.models.numerics import AttentionKernel, Numerics, PallasKernel
from pals.models.paged import LayerCache, Rows
from pals.models.walk import View, attend
from pals.types import AttentionChoice

KERNELS: dict[str, PallasKernel] = {"gpu": "triton", "tpu": "mosaic"}
"""Of the platforms that have one, as jax names them."""

Layers = Sequence[AttentionConfig | LatentAttentionConfig]

Trial = Callable[[PallasKernel, AttentionConfig, Numerics, int], str | None]
"""Says why a kernel does not work here, as `try_kernel` does."""


class Chosen(NamedTuple):
    """The attention of a shard, and why it is this one."""

    kernel: AttentionKernel
    reason: str


def choose_attention(
    asked: AttentionChoice,
    layers: Layers,
    numerics: Numerics,
    page_tokens: int,
    *,
    trial: Trial = try_kernel,
) -> Chosen:
    """Choose the attention of a shard.

    Args:
        asked: ``auto`` takes a kernel where it carries all layers and gives on this device
            what `pals.models.walk` gives.
        layers: The shard's.
        numerics: In which it computes, on which platform.
        page_tokens: Of its cache.
        trial: Runs a kernel on this device.

    Raises:
        InvalidConfig: ``pallas`` was asked for, and cannot be.
    """
    if asked == "xla":
        return Chosen("xla", "asked for")
    kernel = KERNELS.get(numerics.platform)
    if kernel is None:
        problem = f"there is no kernel for {numerics.platform}"
    else:
        kinds = dict.fromkeys(layers)
        problems = (_problem(kernel, kind, numerics, page_tokens, trial) for kind in kinds)
        problem = next(filter(None, problems), None)
        if problem is None:
            return Chosen(kernel, "it gives what xla gives on this device")
    if asked == "pallas":
        advice = "leave out `--attention`, or choose `xla`"
        raise InvalidConfig(source="shard.attention", problem=problem, advice=advice)
    return Chosen("xla", problem)


def _problem(
    kernel: PallasKernel,
    attention: AttentionConfig | LatentAttentionConfig,
    numerics: Numerics,
    page_tokens: int,
    trial: Trial,
) -> str | None:
    if isinstance(attention, LatentAttentionConfig):
        return "latent attention has values within its keys, which no kernel reads"
    problem = _width_problem(kernel, attention.head_dim)
    return problem or trial(kernel, attention, numerics, page_tokens)


def _width_problem(kernel: PallasKernel, width: int) -> str | None:
    if kernel == "triton" and (width < 16 or width & (width - 1)):
        return f"Triton computes with powers of two from 16 on, and heads have {width} numbers"
    return None


def attend_by(
    kernel: AttentionKernel, queries: jax.Array, cache: LayerCache, rows: Rows, view: View
) -> jax.Array:
    """Attend by the attention that was chosen; see `pals.models.walk.attend`."""
    if kernel == "xla":
        return attend(queries, cache, rows, view)
    # Pallas takes as long to import as jax; few machines need it.
    from pals.models.kernels.paged import attend_paged

    return attend_paged(queries, cache, rows, view, kernel)
