"""The compute thread: the only one that touches JAX.

Rows come in through a bounded queue and results go out through a callback, so that a
step, or a compile of minutes, never holds the network up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence

from pals.engine.batch import SessionRequest
from pals.engine.batcher import Batcher
from pals.engine.work import Delivery, InputRow, PenaltyHistory, RefusedRow, StepRunner
from pals.types import Sampling, SessionId


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
        raise NotImplementedError

    @property
    def free_tokens(self) -> int:
        """Tokens that sessions to come find room for."""
        raise NotImplementedError

    @property
    def num_running(self) -> int:
        """Sessions that hold pages, or are about to by a fork."""
        raise NotImplementedError

    def start(self) -> None:
        raise NotImplementedError

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
        raise NotImplementedError

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
        raise NotImplementedError

    def close_session(self, session: SessionId, names: tuple[bytes, ...] = ()) -> None:
        """End a session and free its pages at once; it may be over already, or wait still.

        A step that runs now delivers its row all the same, with its owner.

        Args:
            session: Its id.
            names: Of its blocks, see `Sessions.close`.
        """
        raise NotImplementedError

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
        raise NotImplementedError

    def close(self, timeout_s: float = 2.0) -> None:
        """End the thread after the step it is in, waiting at most ``timeout_s``."""
        raise NotImplementedError
