"""Choosing the layers of a new shard: what the swarm lacks most, as far as it fits.

Pure functions over what is announced.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from pals.net.announce import Announcement
from pals.types import LayerRange, short_id

Capacity = Callable[[int], int]
"""How many layers from a first one on this machine can hold."""


def choose_range(
    announced: Sequence[LayerRange], num_layers: int, capacity: Capacity
) -> LayerRange | None:
    """Return the range of ``[0, num_layers)`` that a new shard is to hold.

    In this order, a range is better than another when it holds more layers that nobody
    serves; when it leaves a chain fewer layers short; when it holds more of the layers that
    the fewest serve; when fewer layers are missing on the best chain through it, since a
    chain is made of whole ranges and one that ends inside of another's joins nothing; when
    it is longer; when its layers are served by fewer; when it starts lower.

    Args:
        announced: The ranges that others serve, of the same model and dtype.
        num_layers: Layers of the model.
        capacity: How many layers fit.

    Returns:
        None when no layer fits anywhere.
    """
    served = _count_shards(announced, num_layers)
    before = _missing_before(announced, num_layers)
    mirrored = [LayerRange(num_layers - r.stop, num_layers - r.start) for r in announced]
    after = _missing_before(mirrored, num_layers)[::-1]
    fewest = min(served)

    def rank(candidate: LayerRange) -> tuple[int, ...]:
        counts = served[candidate.start : candidate.stop]
        missing = before[candidate.start] + after[candidate.stop]
        return (
            -counts.count(0),
            min(missing, before[num_layers]),
            -counts.count(fewest),
            missing,
            -len(candidate),
            sum(counts),
            candidate.start,
        )

    candidates = [
        LayerRange(start, stop)
        for start in range(num_layers)
        for stop in range(start + 1, min(start + capacity(start), num_layers) + 1)
    ]
    return min(candidates, key=rank, default=None)


def _count_shards(announced: Sequence[LayerRange], num_layers: int) -> list[int]:
    """Return how many shards hold each layer."""
    served = [0] * num_layers
    for layers in announced:
        for layer in range(layers.start, layers.stop):
            served[layer] += 1
    return served


def _missing_before(announced: Sequence[LayerRange], num_layers: int) -> list[int]:
    """Return for each boundary how many layers the best chain from 0 up to it lacks."""
    starts_of = defaultdict[int, list[int]](list)
    for layers in announced:
        starts_of[layers.stop].append(layers.start)
    missing = [0]
    for boundary in range(1, num_layers + 1):
        whole = [missing[start] for start in starts_of[boundary]]
        missing.append(min([missing[-1] + 1, *whole]))
    return missing


def explain_choice(
    chosen: LayerRange, announced: Sequence[Announcement], num_layers: int, memory: str
) -> str:
    """Say in a line why a range was chosen.

    Args:
        chosen: The range.
        announced: The shards of others.
        num_layers: Layers of the model.
        memory: What it had to fit into, for people.
    """
    peers = defaultdict[LayerRange, list[str]](list)
    for shard in announced:
        peers[shard.layers].append(short_id(shard.peer))
    reasons = [f"{layers} is served by {', '.join(ids)}" for layers, ids in sorted(peers.items())]
    if announced and 0 not in _count_shards(list(peers), num_layers):
        reasons.append("so every layer is, and these by the fewest")
    reasons = reasons or ["nobody serves this model yet"]
    return f"layers {chosen}: {', '.join(reasons)}; {len(chosen)} layers fit in {memory}"
