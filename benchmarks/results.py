"""The lines that benchmarks print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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

    def compare(
        self, metric: str, samples: Sequence[float], others: Sequence[float], *, to: str
    ) -> Result:
        """Return the line of a ratio, whose samples are the ratios of two samples of a round.

        Args:
            metric: Name of the ratio, ending in `_ratio`.
            samples: Of this subject, one of each round.
            others: Of the other side, one of each round.
            to: What people call the other side.
        """
        ratios = [one / other for one, other in zip(samples, others, strict=True)]
        subject = replace(self, setting={**self.setting, "to": to})
        return subject.summarise(metric, "ratio", ratios)
