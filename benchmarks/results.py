"""The lines that benchmarks print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import msgspec

Setting = dict[str, str | int | float]


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One line: a metric of one system in one setting.

    Attributes:
        system: What was measured, such as `pals`.
        value: Median of the samples.
        n: Number of samples.
        setting: Model, shards, dtype, threads and the like. A comparison, whose metric
            ends in `_ratio`, names its other side in `to`.
        load: The machine's one-minute load average before the run.
    """

    benchmark: str
    system: str
    metric: str
    unit: str
    value: float
    min: float
    max: float
    n: int
    setting: Setting
    load: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What all lines of one run of one system share."""

    benchmark: str
    system: str
    setting: Mapping[str, str | int | float]
    load: float

    def summarise(self, metric: str, unit: str, samples: Sequence[float]) -> Result:
        """Return the line of one metric; ``samples`` is not empty."""
        return Result(
            benchmark=self.benchmark,
            system=self.system,
            metric=metric,
            unit=unit,
            value=median(samples),
            min=min(samples),
            max=max(samples),
            n=len(samples),
            setting=dict(self.setting),
            load=self.load,
        )


def compare(result: Result, other: Result, *, metric: str, to: str) -> Result:
    """Return how many times as large ``result`` is as ``other``.

    Args:
        result: One side, whose system and setting the line keeps.
        other: The other side.
        metric: Name of the ratio, ending in `_ratio`.
        to: What people call the other side.

    Returns:
        The ratio of the medians, between the smallest and the largest that any two of the
        samples have.
    """
    return msgspec.structs.replace(
        result,
        metric=metric,
        unit="ratio",
        value=result.value / other.value,
        min=result.min / other.max,
        max=result.max / other.min,
        n=min(result.n, other.n),
        setting=result.setting | {"to": to},
    )
