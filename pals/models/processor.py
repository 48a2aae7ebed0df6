"""What the processor of this machine can do, where formulations depend on it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
TILES_OF_BF16 = "amx_bf16"


@cache
def has_bf16_tiles() -> bool:
    """Return whether it multiplies whole tiles of bf16 (Intel AMX); False where nothing says so."""
    try:
        return TILES_OF_BF16 in read_flags(CPU_INFO.read_text())
    except OSError:
        return False


def read_flags(cpu_info: str) -> frozenset[str]:
    """Return what the first core of Linux's ``/proc/cpuinfo`` can do."""
    for line in cpu_info.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()
