"""The compute thread: the only one that touches JAX.

Rows come in through a bounded queue and results go out through a callback, so that a
step, or a compile of minutes, never holds the network up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence

from pals.engine.batch import SessionRequest
from pals.engine.batcher import Batcher
from pals.engine.compute_core import Compute, Member, Planned, SamplingChanges
from pals.engine.waking import Wake
from pals.engine.work import (
    Delivery,
    InputRow,
    PenaltyHistory,
    RefusedRow,
    StepOutput,
    StepResult,
    StepRunner,
)
from pals.errors import InternalStepError, InvalidStep, PalsError
from pals.types import Sampling, SessionId

_log = logging.getLogger(__name__)


class ComputeThread:
    """Runs the steps of one shard until closed.

    All methods may be called on any thread; they hold a lock that the compute thread has
    while it plans, which takes less than a millisecond, and never while it computes.

    Args:
        runner: Runs a step.
        batcher: Plans it; nobody else uses it from now on.
        deliver: Called on the compute thread, in order: with the events of a plan before its
            step runs, and with the step when it has run.
        max_queued_bytes: Most bytes of inputs that wait at one time.
        clock: Of every time that goes in or comes out, such as
            `SessionRequest.deadline`, in seconds.
    """

    def __init__(
        self,
        runner: StepRunner,
        batcher: Batcher,
        deliver: Callable[[Delivery], None],
        *,
        max_queued_bytes: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._runner = runner
        self._core = Compute(batcher, is_tail=runner.is_tail, max_queued_bytes=max_queued_bytes)
        self._deliver = deliver
        self._clock = clock
        self._lock = threading.Lock()
        self._wake = Wake()
        self._closing = False
        self._free_s = clock()
        self._thread = threading.Thread(target=self._run, name="pals-compute", daemon=True)

    @property
    def free_tokens(self) -> int:
        """Tokens that sessions to come find room for."""
        with self._lock:
            return self._core.batcher.free_tokens

    @property
    def num_running(self) -> int:
        """Sessions that hold pages, or are about to by a fork."""
        with self._lock:
            return self._core.batcher.num_running

    def start(self) -> None:
        self._thread.start()

    def open(
        self,
        request: SessionRequest,
        owner: Hashable,
        sampling: Sampling | None = None,
        history: PenaltyHistory | None = None,
    ) -> None:
        """Let a session wait for room; an event says when it has it, or that it has not.

        Args:
            request: What its driver asks for; the deadline is on the thread's clock.
            owner: Comes back with everything about this session, and tells it from one
                that had the same id before.
            sampling: At the tail, always; elsewhere None.
            history: What its penalties look at; None where it has none.

        Raises:
            InvalidStep: The id is taken, or the lengths are no lengths.
            SessionTooLong: It would not fit if it were alone.
            PeerSessionsFull: Its peer has as many sessions as one may.
            ShardFull: As many wait already as may.
        """
        with self._lock:
            self._core.open(request, owner, sampling, history, self._clock())
            self._wake.ring()

    def fork(
        self,
        parent: SessionId,
        child: SessionId,
        position: int,
        owner: Hashable,
        sampling: Sampling | None = None,
        history: PenaltyHistory | None = None,
    ) -> None:
        """Begin a session with the first tokens of another, see `Sessions.fork`.

        Its rows may come at once, before the event that says that it is admitted.

        Raises:
            InvalidStep: There is no such parent or position, or the id is taken.
            PeerSessionsFull: Its peer has as many sessions as one may.
            ShardFull: As many run as may.
        """
        with self._lock:
            now = self._clock()
            self._core.fork(parent, child, position, owner, sampling, history, now)
            self._wake.ring()

    def close_session(self, session: SessionId, names: tuple[bytes, ...] = ()) -> None:
        """End a session and free its pages at once; it may be over already, or wait still.

        A step that runs now delivers its row all the same, with its owner.

        Args:
            session: Its id.
            names: Of its blocks, see `Sessions.close`.
        """
        with self._lock:
            self._core.close_session(session, names)
            self._wake.ring()

    def add(self, rows: Sequence[InputRow]) -> list[RefusedRow]:
        """Queue the rows of a frame, each behind the others of its session.

        A row of a session that is over, or of another owner than the session has, goes
        nowhere: it is late. A row may step back to a position below the session's end; what
        waited before it runs before it. Whoever calls this ends the sessions of refused
        rows, and holds rows back that come before their session is admitted: they are
        refused here. Those of a fork may come as soon as `fork` has returned.

        Returns:
            Those that were not queued. The error is `InvalidStep` for what leaves a gap, the
            session's length or what the shard can compute, and `QueueFull` where too many
            tokens or bytes wait.
        """
        refused = self._find_unsound(rows)
        if refused:
            unsound = {id(one.row) for one in refused}
            rows = [row for row in rows if id(row) not in unsound]
        with self._lock:
            refused += self._core.add(rows, self._clock())
            self._wake.ring()
        return refused

    def close(self, timeout_s: float = 2.0) -> None:
        """End the thread after the step it is in, waiting at most ``timeout_s``."""
        with self._lock:
            self._closing = True
            self._wake.ring()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _find_unsound(self, rows: Sequence[InputRow]) -> list[RefusedRow]:
        """Return the rows that no step can compute: once planned, a step has to run."""
        refused: list[RefusedRow] = []
        for row in rows:
            try:
                self._runner.check_inputs(row.inputs)
            except InvalidStep as error:
                refused.append(RefusedRow(row, error))
        return refused

    # --- on the thread ---------------------------------------------------------------

    def _run(self) -> None:
        while (planned := self._wait_for_step()) is not None:
            self._run_step(planned)
            self._free_s = self._clock()

    def _wait_for_step(self) -> Planned | None:
        """Return the next step; None when the thread is to end."""
        while True:
            wait_s = 0.0
            planned, events = None, ()
            with self._lock:
                if self._closing:
                    return None
                if (changes := self._core.take_changes()) is None:
                    planned, events = self._core.plan(self._clock())
                    if planned is None and not events:
                        self._wake.prepare()
                        wait_s = self._core.batcher.next_at() - self._clock()
            if changes is not None:
                self._change_samplings(changes)
                continue
            if events:
                self._deliver(Delivery(events=events, result=None))
            if planned is not None:
                return planned
            if wait_s > 0:
                self._wake.sleep(wait_s)

    def _change_samplings(self, changes: SamplingChanges) -> None:
        """Let the sampler make room for some sessions, without holding the network up."""
        for row_sampling in changes.closed:
            self._runner.close_sampling(row_sampling)
        for member in changes.opened:
            self._open_sampling(member)

    def _open_sampling(self, member: Member) -> None:
        assert member.sampling is not None
        try:
            row_sampling = self._runner.open_sampling(member.sampling, member.history)
        except Exception as failure:
            error = self._show(failure, "a sampler's room could not be made")
            with self._lock:
                self._core.refuse(member, error)
            return
        with self._lock:
            self._core.set_sampling(member, row_sampling)

    def _run_step(self, planned: Planned) -> None:
        started_s = self._clock()
        try:
            for row_sampling, allowed in planned.masks:
                self._runner.set_allowed(row_sampling, allowed)
            output = self._runner.run(planned.step, planned.inputs, planned.samplings)
            finished_s = self._clock()
            if output.pooled is not None:
                with self._lock:
                    output = self._core.pool(planned, output)
        except Exception as failure:
            self._fail(planned, failure, started_s)
            return
        # Whoever waits for the outputs need not wait for the bookkeeping.
        result = self._build_result(planned, output, started_s, finished_s)
        self._deliver(Delivery(events=(), result=result))
        with self._lock:
            self._core.finish(planned, finished_s - started_s)

    def _fail(self, planned: Planned, failure: Exception, started_s: float) -> None:
        """End every session that runs, and begin with an empty cache."""
        finished_s = self._clock()
        error = self._show(failure, f"a step of {len(planned.rows)} rows failed")
        with self._lock:
            events = self._core.fail(error)
        try:
            self._runner.reset()
        except Exception:  # the next step fails as well, and tries again
            _log.exception("the cache of layers %s could not be made anew", self._runner.layers)
        result = self._build_result(planned, None, started_s, finished_s, failure)
        self._deliver(Delivery(events=events, result=result))

    def _show(self, failure: Exception, problem: str) -> PalsError:
        """Return what drivers are told; what only this machine may know goes to its log."""
        if isinstance(failure, PalsError):
            return failure
        _log.error(problem, exc_info=failure)
        return InternalStepError(layers=self._runner.layers)

    def _build_result(
        self,
        planned: Planned,
        output: StepOutput | None,
        started_s: float,
        finished_s: float,
        error: Exception | None = None,
    ) -> StepResult:
        return StepResult(
            rows=planned.rows,
            output=output,
            free_s=self._free_s,
            started_s=started_s,
            finished_s=finished_s,
            error=error,
        )
