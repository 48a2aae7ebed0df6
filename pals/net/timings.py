"""Where the time of a shard's decode steps goes, by part."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

from pals.engine.work import StepResult
from pals.net.control import Stats
from pals.types import SessionId

SAMPLES = 256


def _samples() -> deque[float]:
    return deque(maxlen=SAMPLES)


def _median_ms(samples: Iterable[float]) -> float:
    seconds = list(samples)
    return 1000 * median(seconds) if seconds else 0.0


@dataclass(slots=True)
class StepTimings:
    """Seconds of the last decode steps; see `pals.net.control.Stats` for the parts."""

    steps: int = 0
    _step_s: deque[float] = field(default_factory=_samples)
    _queue_s: deque[float] = field(default_factory=_samples)
    _handover_s: deque[float] = field(default_factory=_samples)
    _codec_s: deque[float] = field(default_factory=_samples)
    _turn_s: deque[float] = field(default_factory=_samples)
    _last_arrival_s: dict[SessionId, float] = field(default_factory=dict[SessionId, float])

    @property
    def step_ms(self) -> float:
        return _median_ms(self._step_s)

    def note_arrival(self, session: SessionId, arrived_s: float) -> None:
        """Note that a decode row came; from one to the next is a turn of the ring."""
        previous_s = self._last_arrival_s.get(session)
        if previous_s is not None:
            self._turn_s.append(arrived_s - previous_s)
        self._last_arrival_s[session] = arrived_s

    def note_pause(self, session: SessionId) -> None:
        """Note that the next row of a session, if one comes, ends no turn."""
        self._last_arrival_s.pop(session, None)

    def note_step(self, result: StepResult, returned_s: float) -> None:
        """Note a step that is back on the network's thread since ``returned_s``.

        One without decode rows counts for nothing.
        """
        rows = [row for row in result.rows if row.kind != "prefill"]
        if not rows:
            return
        self.steps += 1
        self._step_s.append(result.finished_s - result.started_s)
        back_s = returned_s - result.finished_s
        for row in rows:
            opened_s = row.arrived_s + row.codec_s
            ready_s = max(opened_s, result.free_s)
            self._queue_s.append(ready_s - opened_s)
            self._handover_s.append(result.started_s - ready_s + back_s)
            self._codec_s.append(row.codec_s)

    def to_stats(self, seal_s: Iterable[float]) -> Stats:
        """Return the medians, with those of sealing the frames that left."""
        return Stats(
            steps=self.steps,
            step_ms=self.step_ms,
            queue_ms=_median_ms(self._queue_s),
            handover_ms=_median_ms(self._handover_s),
            codec_ms=_median_ms(self._codec_s) + _median_ms(seal_s),
            turn_ms=_median_ms(self._turn_s),
        )
