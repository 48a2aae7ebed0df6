"""Loads some layers in a process of its own and says what that took, as one line of JSON.

Called with the model's folder, the range and the dtype. The process's memory before the
load has jax running on its device: what comes on top is the load's.
"""

from __future__ import annotations

import sys
import time

import msgspec

from pals.types import Dtype, EngineLimits, LayerRange

LIMITS = EngineLimits(max_sessions=1, max_context_tokens=256, max_chunk_tokens=32)


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """What a load took.

    Attributes:
        base_bytes: Resident memory before it.
        peak_bytes: The most that was resident until its end.
        device_bytes: Weights and cache that are held after it.
    """

    load_s: float
    base_bytes: int
    peak_bytes: int
    device_bytes: int


def main() -> None:
    """Load what the command line says and print what it took."""
    folder, layers, dtype = sys.argv[1], LayerRange.parse(sys.argv[2]), sys.argv[3]
    import jax.numpy as jnp

    from pals.engine.shard import Shard
    from pals.models.hub import resolve_model

    snapshot = resolve_model(folder, layers)
    jnp.zeros(8).block_until_ready()
    base_bytes = read_memory("VmRSS")
    started_s = time.perf_counter()
    shard = Shard.load(snapshot, layers, dtype=msgspec.convert(dtype, Dtype), limits=LIMITS)
    used = shard.memory_bytes()
    loaded = Loaded(
        load_s=time.perf_counter() - started_s,
        base_bytes=base_bytes,
        peak_bytes=read_memory("VmHWM"),
        device_bytes=used.weights + used.kv + used.bank,
    )
    print(msgspec.json.encode(loaded).decode(), flush=True)


def read_memory(field: str, process: int | str = "self") -> int:
    """Return a field of Linux's /proc/PID/status in bytes: VmRSS is now, VmHWM the most."""
    with open(f"/proc/{process}/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
