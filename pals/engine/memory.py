# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""How much memory this machine has for a shard, and how sizes are written."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """A machine's memory for shards.

    Attributes:
        size_bytes: How much there is.
        source: What it is of, for people; empty when the user named it.
    """

    size_bytes: int
    source: str = ""

    def __str__(self) -> str:
        size = format_bytes(self.size_bytes)
        return f"{size} of {self.source}" if self.source else size


def find_memory(devices: int = 1) -> Memory:
    """Return the memory of each of some devices, or its share of what the host has free.

    On an accelerator it is what jax may take of it, whatever else runs there.
    """
    import jax

    device = jax.local_devices()[0]
    stats = None if device.platform == "cpu" else device.memory_stats()
    if stats and "bytes_limit" in stats:
        return Memory(size_bytes=stats["bytes_limit"], source=f"{device.device_kind} memory")
    return Memory(size_bytes=free_host_bytes() // devices, source="free memory")


def free_host_bytes(root: Path = Path("/")) -> int:
    """Return what programs may still take; all there is where the system does not say.

    Args:
        root: Where the files of Linux are looked for. A container's own limit counts too.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    kilobytes = {name: value.split()[0] for name, _, value in (x.partition(":") for x in lines)}
    free = int(kilobytes["MemAvailable"]) * 1024
    limit = _container_bytes(root / "sys/fs/cgroup")
    return free if limit is None else min(free, limit)


def _container_bytes(group: Path) -> int | None:
    """Return what a control group (version 2) leaves; None without a limit."""
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        stats = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit == "max":
        return None
    # File pages that were not read lately make room by themselves.
    return max(0, int(limit) - used + int(stats.get("inactive_file", 0)))


def format_bytes(size_bytes: int) -> str:
    """Return a size for people: three digits and a binary unit."""
    size = float(size_bytes)
    for unit in _UNITS[:-1]:
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} {_UNITS[-1]}"
