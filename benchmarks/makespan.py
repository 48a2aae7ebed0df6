"""The least time in which chunks can pass through a pipeline of shards."""

from __future__ import annotations

from collections.abc import Sequence


def ideal_makespan_s(
    compute_s: Sequence[Sequence[float]], sent_bytes: Sequence[int], *, bytes_per_s: float
) -> float:
    """Return when the last chunk leaves the last shard, after the first could begin.

    Each shard computes one chunk at a time, each link carries one at a time, and both work
    on one chunk while the other has the one before; delays are the caller's to add, once
    for each hop.

    Args:
        compute_s: For each shard, the seconds of each chunk.
        sent_bytes: The bytes of each chunk between two shards.
        bytes_per_s: Of each link; 0 is no bottleneck.
    """
    transfer_s = [n / bytes_per_s if bytes_per_s else 0.0 for n in sent_bytes]
    ready_s = [0.0] * len(sent_bytes)
    for shard, chunk_s in enumerate(compute_s):
        if shard > 0:
            ready_s = _pass(ready_s, transfer_s)
        ready_s = _pass(ready_s, chunk_s)
    return ready_s[-1]


def _pass(ready_s: Sequence[float], work_s: Sequence[float]) -> list[float]:
    """Return when each chunk is through a station that takes them one by one, in order."""
    free_s = 0.0
    done_s: list[float] = []
    for ready, work in zip(ready_s, work_s, strict=True):
        free_s = max(free_s, ready) + work
        done_s.append(free_s)
    return done_s
