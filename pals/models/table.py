"""Weight tables: which tensors of a checkpoint make up which parameter of a module.

A parameter whose path in the module tree is its tensor's name needs no entry. Every
other one has rules; the first whose tensors are all there is used, since some families
are found in the wild in two spellings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
Shape = tuple[int, ...]


def unchanged(block: Array) -> Array:
    """Return a block as it is."""
    return block


def transpose(block: Array) -> Array:
    """Turn a matrix ``(in, out)`` into ``(out, in)``."""
    return block.T


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A block of a parameter, and the tensor that it comes from.

    Attributes:
        source: Name of the tensor.
        shape: What the tensor's shape must be.
        entry: The entry of its first axis that this piece takes; None for all of it.
        index: Entry of the parameter's first axis that is filled; None for no such axis.
        rows: Rows that are filled, of the parameter or of that entry.
        change: From the block as it is stored to the block as it is held; where it is
            not `unchanged`, the tensor (or its entry) is read at one time.
    """

    source: str
    shape: Shape
    entry: int | None = None
    index: int | None = None
    rows: slice
    change: Callable[[Array], Array] = unchanged


class Rule(Protocol):
    """Where the checkpoint keeps a parameter."""

    def pieces(self, prefix: str, shape: Shape) -> Iterator[Piece]:
        """Yield the pieces of a parameter of ``shape``; their names begin with ``prefix``."""
        ...


@dataclass(frozen=True, slots=True)
class Named:
    """One tensor of the same shape under another name."""

    name: str

    def pieces(self, prefix: str, shape: Shape) -> Iterator[Piece]:
        yield Piece(source=prefix + self.name, shape=shape, rows=slice(0, shape[0]))


class PerExpert:
    """A parameter [E, R, C] whose experts each have tensors of their own, row below row."""

    def __init__(self, *names: str) -> None:
        """Take ``names`` that hold ``{}`` where the expert's number stands."""
        self._names = names

    def pieces(self, prefix: str, shape: Shape) -> Iterator[Piece]:
        num_experts, rows, *rest = shape
        step = rows // len(self._names)
        for expert in range(num_experts):
            for number, name in enumerate(self._names):
                yield Piece(
                    source=prefix + name.format(expert),
                    shape=(step, *rest),
                    index=expert,
                    rows=slice(number * step, (number + 1) * step),
                )


class Fused:
    """A parameter [E, R, ...] that is one tensor, whose experts may be stored otherwise."""

    def __init__(
        self,
        name: str,
        *,
        transposed: bool = False,
        change: Callable[[Array], Array] = unchanged,
    ) -> None:
        """Take the tensor ``name``.

        Args:
            name: Of the tensor.
            transposed: It is [E, C, R].
            change: From one expert's block, as `Piece.change`.
        """
        self._name = name
        self._transposed = transposed
        self._change = change

    def pieces(self, prefix: str, shape: Shape) -> Iterator[Piece]:
        num_experts, *block = shape
        stored = (num_experts, *(reversed(block) if self._transposed else block))
        for expert in range(num_experts):
            yield Piece(
                source=prefix + self._name,
                shape=stored,
                entry=expert,
                index=expert,
                rows=slice(0, block[0]),
                change=self._change,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """How the names of a checkpoint begin."""

    model: str = "model."
    head: str = "lm_head."


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightTable:
    """The names of one family's checkpoints.

    Attributes:
        layer: Rules of the parameters of a layer, by their path in it.
        roots: The beginnings that occur; the first that fits is used.
        unused: Patterns of whole names that no shard reads, such as a vision tower's.
    """

    layer: Mapping[str, Sequence[Rule]] = field(
        default_factory=lambda: MappingProxyType[str, Sequence[Rule]]({})
    )
    roots: Sequence[Root] = (Root(),)
    unused: Sequence[str] = ()

    def root_of(self, present: set[str]) -> Root:
        """Return the beginning of the names in ``present``."""
        for root in self.roots:
            if any(name.startswith(f"{root.model}layers.") for name in present):
                return root
        return self.roots[0]

    def layer_pieces(
        self, parameter: str, prefix: str, shape: Shape, present: set[str]
    ) -> list[Piece]:
        """Return the pieces of one parameter of a layer whose names begin with ``prefix``."""
        rules = self.layer.get(parameter, (Named(parameter),))
        candidates = [list(rule.pieces(prefix, shape)) for rule in rules]
        whole = [pieces for pieces in candidates if all(p.source in present for p in pieces)]
        return (whole or candidates)[0]
