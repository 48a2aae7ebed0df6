"""Choosing a chain: which shards, in which order, cover every layer once.

Pure functions over verified announcements.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from pals.errors import NoChain
from pals.net.announce import Announcement
from pals.types import ActivationDtype, LayerRange, PeerId, activation_dtype, short_id

NO_FAILURES: Mapping[PeerId, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """The shards that cover ``[0, num_layers)``, head first, tail last."""

    hops: tuple[Announcement, ...]

    @property
    def head(self) -> Announcement:
        return self.hops[0]

    @property
    def tail(self) -> Announcement:
        return self.hops[-1]

    @property
    def step_ms(self) -> float:
        """Predicted compute time of one token."""
        return sum(hop.step_ms for hop in self.hops)

    @property
    def max_context_tokens(self) -> int:
        """Tokens that a session may reach on every hop."""
        return min(hop.max_context_tokens for hop in self.hops)

    def __str__(self) -> str:
        return " -> ".join(f"{short_id(hop.peer)}[{hop.layers}]" for hop in self.hops)


@dataclass(frozen=True, slots=True)
class _Path:
    """The cheapest way found so far from layer 0 to one boundary.

    Attributes:
        cost: Compared in order: layers nobody serves, gaps, failures of the shards lately,
            shards without enough free tokens, hops, milliseconds.
        hops: The shards taken.
        gaps: The ranges that no shard covers.
    """

    cost: tuple[int, int, int, int, int, float] = (0, 0, 0, 0, 0, 0.0)
    hops: tuple[Announcement, ...] = ()
    gaps: tuple[LayerRange, ...] = ()

    def through(self, hop: Announcement, failures: int, tokens: int) -> _Path:
        layers, gaps, failed, full, count, step_ms = self.cost
        full += hop.free_tokens < tokens
        cost = (layers, gaps, failed + failures, full, count + 1, step_ms + hop.step_ms)
        return _Path(cost, (*self.hops, hop), self.gaps)

    def across(self, gap: LayerRange) -> _Path:
        layers, gaps, failed, full, count, step_ms = self.cost
        cost = (layers + len(gap), gaps + 1, failed, full, count, step_ms)
        return _Path(cost, self.hops, (*self.gaps, gap))


def find_chain(
    announcements: Iterable[Announcement],
    *,
    manifest: bytes,
    num_layers: int,
    dtype: ActivationDtype | None = None,
    model: str | None = None,
    failures: Mapping[PeerId, int] = NO_FAILURES,
    tokens: int = 1,
) -> Chain:
    """Return the best chain of whole shards of one model and one dtype of activations.

    Shards whose layers come from other bytes than those of most holders are left out.
    Shards hold fixed ranges, so each hop begins where the one before it ends. The chain
    with the fewest failures wins, so that a suspect is only used where nobody else serves
    its layers; then one whose shards all have room, then the one with the fewest hops, then
    the one with the lowest predicted time of a step.

    Args:
        announcements: Verified announcements of any models.
        manifest: The model, by its 32-byte manifest.
        num_layers: Layers of the model.
        dtype: The activations to run in; ``None`` takes whichever gives the best chain.
        model: The model's name for the error; by default the one that is announced.
        failures: How often peers failed lately; those left out did not.
        tokens: That a session needs room for at every shard.

    Raises:
        NoChain: No such chain exists; ``missing`` names the fewest layers that, once
            served, complete one.
    """
    by_dtype: defaultdict[ActivationDtype, list[Announcement]] = defaultdict(list)
    shards = [a for a in announcements if a.manifest == manifest and a.num_layers == num_layers]
    for a in agreeing(shards):
        if dtype in (None, activation_dtype(a.dtype)):
            by_dtype[activation_dtype(a.dtype)].append(a)
            model = model or a.model_id
    candidates = [
        _cheapest(shards, num_layers, failures, tokens) for _, shards in sorted(by_dtype.items())
    ]
    best = min(candidates, key=lambda path: path.cost, default=None)
    if best is None:
        best = _cheapest([], num_layers, failures, tokens)
    if best.gaps:
        missing = ",".join(str(gap) for gap in best.gaps)
        raise NoChain(model=model or manifest.hex(), missing=missing)
    return Chain(hops=best.hops)


def agreeing(shards: Sequence[Announcement]) -> list[Announcement]:
    """Return the shards of one model that hold the same bytes wherever they overlap.

    Of holders of one layer that disagree only those stay whose hash most announce; where
    that is even, everybody who sees the same announcements keeps the same side.
    """
    votes: defaultdict[int, Counter[bytes]] = defaultdict(Counter)
    for shard in shards:
        for layer, layer_hash in _hashes(shard):
            votes[layer][layer_hash] += 1
    kept = {layer: max(counts, key=lambda h: (counts[h], h)) for layer, counts in votes.items()}
    return [s for s in shards if all(kept[layer] == layer_hash for layer, layer_hash in _hashes(s))]


def _hashes(shard: Announcement) -> Iterable[tuple[int, bytes]]:
    return enumerate(shard.layer_hashes, start=shard.layers.start)


def _cheapest(
    shards: Sequence[Announcement],
    num_layers: int,
    failures: Mapping[PeerId, int],
    tokens: int,
) -> _Path:
    """Return the cheapest path from 0 to ``num_layers``, over gaps where it must.

    Dijkstra's algorithm; every edge leads to a higher layer, so the boundaries in
    ascending order are already the order in which it would settle them.
    """
    starting: defaultdict[int, list[Announcement]] = defaultdict(list)
    for shard in shards:
        starting[shard.layers.start].append(shard)
    inner = {b for s in shards for b in (s.layers.start, s.layers.stop)}
    boundaries = sorted({0, num_layers} | inner)
    best: dict[int, _Path] = {0: _Path()}
    for i, start in enumerate(boundaries):
        path = best[start]
        for shard in starting[start]:
            through = path.through(shard, failures.get(shard.peer, 0), tokens)
            _keep_cheaper(best, shard.layers.stop, through)
        for stop in boundaries[i + 1 :]:
            _keep_cheaper(best, stop, path.across(LayerRange(start, stop)))
    return best[num_layers]


def _keep_cheaper(best: dict[int, _Path], boundary: int, path: _Path) -> None:
    if boundary not in best or path.cost < best[boundary].cost:
        best[boundary] = path
