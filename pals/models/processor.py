"""What the processor of this machine can do, where formulations depend on it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

CPU_INFO = Path("/proc/cpuinfo")
TILES_OF_BF16 = "amx_bf16"
VECTORS_OF_BF16 = "avx512_bf16"

Bf16Products = Literal["tiles", "vectors", "none", "unknown"]


@cache
def bf16_products() -> Bf16Products:
    """Return with what the processor multiplies bf16.

    That is whole tiles of it (Intel AMX), vectors of it (AVX-512), or nothing of its own, so that
    each number is widened to float32 first; unknown where Linux does not say so of an x86.
    """
    try:
        flags = read_flags(CPU_INFO.read_text())
    except OSError:
        return "unknown"
    if not flags:
        return "unknown"
    if TILES_OF_BF16 in flags:
        return "tiles"
    return "vectors" if VECTORS_OF_BF16 in flags else "none"


def read_flags(cpu_info: str) -> frozenset[str]:
    """Return what the first core of Linux's ``/proc/cpuinfo`` can do."""
    for line in cpu_info.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()
