"""Rotary scaling of a GGUF file, as the ``rope_scaling`` of a Hugging Face config.

Linear and YaRN scaling stand in the metadata. Llama 3.1's does not: llama.cpp's converter
(`LlamaModel.generate_extra_tensors`) evaluates it and stores the divisor of every frequency
as the tensor ``rope_freqs.weight``, from which the parameters are recovered here.
"""

from __future__ import annotations

import math

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from pals.errors import CorruptModel, UnsupportedModel
from pals.models.gguf_reader import GgufHeader, Json

ROPE_FACTORS = "rope_freqs.weight"

LLAMA3_ORIGINAL_CONTEXT = 8192
"""Only the quotients of this with the two frequency factors matter: any value serves."""

MAX_CONTEXT = 1 << 30
_TOLERANCE = 1e-5
_SNAP = 64


def as_written(value: float) -> float:
    """Return the shortest decimal of a float32: what the model's author wrote."""
    return float(str(np.float32(value)))


def rope_scaling(header: GgufHeader, architecture: str, *, head_dim: int, theta: float) -> Json:
    """Return the value of ``rope_scaling`` in config.json, or None.

    Raises:
        UnsupportedModel: The scaling has no form in a Hugging Face config.
        CorruptModel: A parameter is missing or no number.
    """
    prefix = f"{architecture}.rope.scaling."
    kind = header.text(prefix + "type", default="none")
    if ROPE_FACTORS in header.tensors:
        if kind != "none":
            raise _unsupported(header, f"`{ROPE_FACTORS}` and `{prefix}type` `{kind}` together")
        return _llama3(header, _read_factors(header, head_dim // 2), head_dim, theta)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise _unsupported(header, f"`{prefix}type` is `{kind}`")
    scaling: dict[str, Json] = {
        "rope_type": kind,
        "factor": as_written(header.number(prefix + "factor")),
    }
    return scaling if kind == "linear" else scaling | _yarn(header, prefix)


def _unsupported(header: GgufHeader, problem: str) -> UnsupportedModel:
    return UnsupportedModel(source=header.source, problem=problem)


def _yarn(header: GgufHeader, prefix: str) -> dict[str, Json]:
    extrapolation = header.metadata.get(prefix + "yarn_ext_factor", 1.0)
    if extrapolation != 1.0:
        raise _unsupported(header, f"`{prefix}yarn_ext_factor` is `{extrapolation}`")
    found: dict[str, Json] = {
        "original_max_position_embeddings": header.positive(
            prefix + "original_context_length", maximum=MAX_CONTEXT
        )
    }
    names = {
        "yarn_attn_factor": "attention_factor",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    }
    for ours, theirs in names.items():
        if prefix + ours in header.metadata:
            found[theirs] = as_written(header.number(prefix + ours))
    return found


def _read_factors(header: GgufHeader, size: int) -> NDArray[np.float64]:
    tensor = header.tensors[ROPE_FACTORS]
    if tensor.shape != (size,) or tensor.kind is not GGMLQuantizationType.F32:
        problem = f"`{ROPE_FACTORS}` is {tensor.kind.name} {tensor.shape}, expected F32 ({size},)"
        raise CorruptModel(source=header.source, problem=problem)
    with header.source.open("rb") as file:
        file.seek(tensor.offset)
        raw = file.read(tensor.size_bytes)
    if len(raw) != tensor.size_bytes:
        raise CorruptModel(source=header.source, problem=f"`{ROPE_FACTORS}` is cut short")
    factors = np.frombuffer(raw, "<f4").astype(np.float64)
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        problem = f"`{ROPE_FACTORS}` holds other than finite numbers above 0"
        raise CorruptModel(source=header.source, problem=problem)
    return factors


def _llama3(
    header: GgufHeader, factors: NDArray[np.float64], head_dim: int, theta: float
) -> dict[str, Json] | None:
    """Recover the parameters, and keep them only if they give the same factors back."""
    if (factors == 1.0).all():
        return None
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    factor = as_written(factors.max())
    for low, high in (*_fitted(factors, wavelengths, factor), (1.0, 4.0)):
        again = llama3_factors(wavelengths, factor=factor, low=low, high=high)
        if np.allclose(again, factors, rtol=_TOLERANCE, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": LLAMA3_ORIGINAL_CONTEXT,
            }
    raise _unsupported(header, f"`{ROPE_FACTORS}` follows no `llama3` rope scaling")


def llama3_factors(
    wavelengths: NDArray[np.float64], *, factor: float, low: float, high: float
) -> NDArray[np.float64]:
    """Return by what Llama 3.1 divides each frequency: `_compute_llama3_parameters`."""
    smooth = (LLAMA3_ORIGINAL_CONTEXT / wavelengths - low) / (high - low)
    return 1 / (1 / factor + (1 - 1 / factor) * np.clip(smooth, 0, 1))


def _fitted(
    factors: NDArray[np.float64], wavelengths: NDArray[np.float64], factor: float
) -> list[tuple[float, float]]:
    """Fit (low, high) to the frequencies between both; empty when fewer than two are.

    Between them ``smooth`` is linear in the frequency, with slope and intercept
    ``context / (high - low)`` and ``-low / (high - low)``.
    """
    between = (factors > 1.0) & (factors < factor)
    if between.sum() < 2:
        return []
    smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
    slope, intercept = np.polyfit(LLAMA3_ORIGINAL_CONTEXT / wavelengths[between], smooth, 1)
    if slope <= 0 or intercept >= 0:
        return []
    low, high = -intercept / slope, (1 - intercept) / slope
    snapped = round(low * _SNAP) / _SNAP, round(high * _SNAP) / _SNAP
    return [pair for pair in (snapped, (float(low), float(high))) if pair[0] < pair[1]]
