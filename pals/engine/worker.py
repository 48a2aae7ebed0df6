"""The compute thread: the only one that touches JAX.

Rows come in through a bounded queue and results go out through a callback, so that a
step, or a compile of minutes, never holds the network up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pals.engine.scheduler import Scheduler, WorkItem
from pals.errors import PalsError
from pals.types import EngineLimits, Sampling

_log = logging.getLogger(__name__)

_NOT_SAMPLED = Sampling()
_NOTHING: npt.NDArray[np.generic] = np.empty(0, np.int32)


class StepRunner(Protocol):
    """What the compute thread needs of `pals.engine.shard.Shard`."""

    limits: EngineLimits

    def prefill(
        self,
        *,
        slot: int,
        position: int,
        inputs: npt.NDArray[np.generic],
        sampling: Sampling | None,
    ) -> npt.NDArray[np.generic]: ...

    def decode(
        self,
        *,
        slots: list[int],
        positions: list[int],
        inputs: npt.NDArray[np.generic],
        samplings: list[Sampling],
    ) -> npt.NDArray[np.generic]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """A finished step.

    Attributes:
        items: The rows that ran together.
        outputs: What came out, item after item: ``[sum(T), D]``, or at the tail
            ``int32[n]``, an id for each item that samples.
        free_s: When the thread had nothing to do before it, seconds of `time.perf_counter`.
        started_s: When the step began.
        finished_s: When its outputs were on the host.
        error: Set when the step failed; `outputs` is then empty.
    """

    items: list[WorkItem]
    outputs: npt.NDArray[np.generic]
    free_s: float
    started_s: float
    finished_s: float
    error: Exception | None = None


class ComputeThread:
    """Runs steps of one shard until closed.

    Args:
        shard: Runs a step.
        deliver: Called on the thread with each finished step.
        max_queued_bytes: Most bytes of inputs that wait at one time.
    """

    def __init__(
        self,
        shard: StepRunner,
        deliver: Callable[[StepResult], None],
        *,
        max_queued_bytes: int,
    ) -> None:
        self._shard = shard
        self._deliver = deliver
        self._scheduler = Scheduler(max_rows=shard.limits.max_sessions, max_bytes=max_queued_bytes)
        self._lock = threading.Lock()
        # Held but while it wakes the thread: a condition would cost some more of each step.
        self._work = threading.Lock()
        self._work.acquire()
        self._is_idle = False
        self._closing = False
        self._running: list[WorkItem] = []
        self._free_s = time.perf_counter()
        self._thread = threading.Thread(target=self._run, name="pals-compute", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, items: list[WorkItem]) -> None:
        """Queue the rows of one frame.

        Raises:
            QueueFull: They do not fit; those before the first that does not are queued.
        """
        try:
            with self._lock:
                for item in items:
                    self._scheduler.add(item)
        finally:
            self._wake()

    def drop(self, session: Hashable) -> None:
        """Forget the waiting rows of a session; the step that runs now is not touched.

        Call it before the session's slot is given to another.
        """
        with self._lock:
            self._scheduler.drop(session)
            self._running = [item for item in self._running if item.session != session]

    def close(self, timeout_s: float = 2.0) -> None:
        """End the thread after the step it is in, waiting at most ``timeout_s``."""
        self._closing = True
        self._wake()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (step := self._wait_for_step()) is not None:
            for result in self._run_step(step):
                self._deliver(result)
            self._free_s = time.perf_counter()

    def _wait_for_step(self) -> list[WorkItem] | None:
        while True:
            with self._lock:
                if self._closing:
                    return None
                if step := self._scheduler.next_step():
                    self._running = list(step)
                    return step
                self._is_idle = True
            self._work.acquire()

    def _wake(self) -> None:
        """Let the thread look, if it waits for something to do."""
        with self._lock:
            was_idle, self._is_idle = self._is_idle, False
        if was_idle:
            self._work.release()

    def _run_step(self, items: list[WorkItem]) -> list[StepResult]:
        """Run a step; a batch that is refused is run row by row to find whose fault it is."""
        result = self._try_step(items)
        if len(items) > 1 and isinstance(result.error, PalsError):
            return [self._try_step([item]) for item in items if self._is_wanted(item)]
        return [result]

    def _is_wanted(self, item: WorkItem) -> bool:
        with self._lock:
            return any(item is running for running in self._running)

    def _try_step(self, items: list[WorkItem]) -> StepResult:
        started_s = time.perf_counter()
        outputs = _NOTHING
        error: Exception | None = None
        try:
            outputs = self._decode(items) if items[0].is_decode else self._prefill(items[0])
        except PalsError as refused:
            error = refused
        except Exception as failure:  # one bad step must not end every other session
            _log.exception("a step of %d rows failed", len(items))
            error = failure
        return StepResult(
            items=items,
            outputs=outputs,
            free_s=self._free_s,
            started_s=started_s,
            finished_s=time.perf_counter(),
            error=error,
        )

    def _prefill(self, item: WorkItem) -> npt.NDArray[np.generic]:
        return self._shard.prefill(
            slot=item.slot, position=item.position, inputs=item.inputs, sampling=item.sampling
        )

    def _decode(self, items: list[WorkItem]) -> npt.NDArray[np.generic]:
        inputs = items[0].inputs
        if len(items) > 1:
            inputs = np.concatenate([item.inputs for item in items])
        return self._shard.decode(
            slots=[item.slot for item in items],
            positions=[item.position for item in items],
            inputs=inputs,
            samplings=[item.sampling or _NOT_SAMPLED for item in items],
        )
