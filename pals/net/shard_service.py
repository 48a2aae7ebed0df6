"""The serving side of one shard: frames in, steps on the compute thread, frames out.

Runs on the trio thread. Every decision about a session is `SessionTable`'s; every step
is `ComputeThread`'s; this shell carries rows between them and keeps the timings.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import trio

from pals.engine import batch
from pals.engine.compute import ComputeThread
from pals.engine.work import Delivery, InputRow, PenaltyHistory, RowResult, StepResult
from pals.errors import (
    InvalidActivation,
    InvalidFrame,
    PalsError,
    SessionRefused,
    ShardDraining,
    ShardLost,
)
from pals.net.activations import are_sound, check_states
from pals.net.control import (
    Ack,
    Close,
    Control,
    Draining,
    Failed,
    Fork,
    Hop,
    Open,
    Opened,
    Preempted,
    Refused,
    StatsRequest,
    session_of,
    split_names,
)
from pals.net.early import EarlyRows
from pals.net.flow import AckPolicy, SessionFlow, window_bytes, window_tokens
from pals.net.guiding import Guides, MaskSource
from pals.net.links import Arrival, Links
from pals.net.model_shape import ModelShape
from pals.net.outbound import Outbound
from pals.net.process_report import RoleLine
from pals.net.ring import SessionTable, ShardSession
from pals.net.tail import TailOutput, sampling_of
from pals.net.timings import StepTimings
from pals.net.wire import (
    CONTROL_SHAPE,
    NUMPY_DTYPES,
    FrameShape,
    Kind,
    Lane,
    Row,
)
from pals.types import LayerRange, PeerId, Sampling, SessionId, short_id

_log = logging.getLogger(__name__)

EXPIRY_INTERVAL_S = 5.0


class _Came(NamedTuple):
    """A received row: its inputs, when its frame came, and what opening that took.

    ``is_sound`` is whether nothing is wrong with the hidden states of its whole frame.
    """

    row: Row
    inputs: npt.NDArray[np.generic]
    arrived_s: float
    codec_s: float
    is_sound: bool


class ShardService:
    """One shard as the network sees it.

    Attributes:
        guides: The sessions of a tail that grammars guide; somebody has to `run` it.

    Args:
        links: The node's links.
        table: Its sessions; none is in it yet.
        model: Whose layers it holds.
        nursery: Runs what waits for links.
        clock: The compute thread's.
        masks: Knows the grammars of answers, at a tail that has a tokenizer.
    """

    def __init__(
        self,
        links: Links,
        table: SessionTable,
        model: ModelShape,
        nursery: trio.Nursery,
        *,
        clock: Callable[[], float] = time.perf_counter,
        masks: MaskSource | None = None,
    ) -> None:
        self._links = links
        self._outbound = Outbound(links, self._on_unsent)
        self._table = table
        self._model = model
        self._nursery = nursery
        self._clock = clock
        self._is_tail = table.layers.stop == model.num_layers
        self._input = model.input_of(table.layers.start)
        self._output = model.output_of(table.layers.stop)
        self._compute: ComputeThread | None = None
        self._timings = StepTimings()
        self._flows: dict[ShardSession, SessionFlow[InputRow]] = {}
        self.guides = Guides(table.local, masks, submit=self._queue, fail=self._fail)
        self._tail = TailOutput(
            self._outbound,
            table,
            self._flows,
            self._timings,
            self.guides,
            model.manifest,
            model.num_layers,
            model.hidden_size,
        )
        self._openings: dict[ShardSession, trio.CancelScope] = {}
        self._early: EarlyRows[_Came] = EarlyRows()
        self._is_draining = False
        self._idle = trio.Event()

    @property
    def layers(self) -> LayerRange:
        return self._table.layers

    @property
    def free_tokens(self) -> int:
        """Tokens that sessions to come find room for."""
        return 0 if self._is_draining else self._thread.free_tokens

    @property
    def step_ms(self) -> float:
        return self._timings.step_ms

    @property
    def max_queued_bytes(self) -> int:
        """Bytes that wait for steps when every session's window is full."""
        return self._table.limits.max_sessions * window_bytes(self._input)

    def attach(self, compute: ComputeThread) -> None:
        self._compute = compute

    @property
    def _thread(self) -> ComputeThread:
        assert self._compute is not None
        return self._compute

    async def expire_sessions(self) -> None:
        """End sessions without traffic, until cancelled."""
        while True:
            await trio.sleep(EXPIRY_INTERVAL_S)
            self._early.expire(trio.current_time())
            self.guides.fail_late(trio.current_time())
            for session in self._table.remove_idle(trio.current_time()):
                self._forget(session)
                self._report(session, "PALS-SESSION-IDLE", f"idle for {self._table.idle_s} s")

    # --- leaving ---------------------------------------------------------------------

    @property
    def sessions(self) -> int:
        """How many sessions run."""
        return len(self._table)

    async def drain(self) -> None:
        """Take no more sessions, ask the drivers to move theirs, and wait until none is left."""
        self._is_draining = True
        for driver in self._table.drivers():
            self._send_control(driver, Draining())
        if len(self._table):
            await self._idle.wait()

    # --- control ---------------------------------------------------------------------

    def accepted(self, lane: Lane) -> tuple[FrameShape, ...]:
        return (CONTROL_SHAPE,) if lane is Lane.CONTROL else (self._input,)

    def on_control(self, peer: PeerId, message: Control) -> None:
        """Take a control message; those that are not for a shard are ignored."""
        match message:
            case Open():
                self._open(peer, message)
            case Fork():
                self._fork(peer, message)
            case Close():
                self._close(peer, message)
            case Ack():
                self._take_ack(peer, message)
            case StatsRequest():
                stats = self._timings.to_stats(self._links.decode_seal_s)
                self._send_control(peer, stats)
            case _:
                pass

    def describe(self) -> RoleLine:
        """Return what people are told of it; the model's name is the announcement's."""
        return RoleLine(
            role="shard",
            layers=str(self.layers),
            sessions=self.sessions,
            free_tokens=self.free_tokens,
        )

    def needs(self, peer: PeerId) -> bool:
        """Return whether a session is open that goes by way of ``peer``."""
        return self._table.needs(peer)

    def on_peer_lost(self, peer: PeerId, problem: str) -> None:
        """Fail the sessions that cannot go on without ``peer``."""
        self._early.forget_peer(peer)
        for session in self._table.remove_peer(peer):
            self._forget(session)
            text = f"lost peer {short_id(peer)}: {problem}"
            self._report(session, ShardLost.code, text, lost=peer)

    def _open(self, driver: PeerId, message: Open) -> None:
        if (stranger := self._find_stranger(message)) is not None:
            problem = f"{short_id(stranger)} of its chain is no member"
            refusal = SessionRefused(peer=self._table.local, problem=problem)
            self._refuse(driver, SessionId(message.session), refusal, unreachable=stranger)
            return
        try:
            session, early = self._take_session(driver, message)
        except PalsError as error:
            self._refuse(driver, SessionId(message.session), error)
            return
        self._begin(session)
        for came in early:
            self._submit(self._take_row(session.upstream, Lane.PREFILL, came))

    def _take_session(self, driver: PeerId, message: Open) -> tuple[ShardSession, list[_Came]]:
        """Take a session, which waits for room from now on, and what came of its prompt."""
        if self._is_draining:
            raise ShardDraining(peer=short_id(self._table.local))
        session = self._table.open(driver, message, trio.current_time())
        try:
            early = self._early.take(session.upstream, session.session)
            if early is None:
                problem = "its prompt came too long before it, or with too many others"
                raise SessionRefused(peer=self._table.local, problem=problem)
            self.guides.open(session, trio.current_time())
            self._ask_for_room(session, message)
        except PalsError:
            self._give_up(session)
            raise
        return session, early

    def _give_up(self, session: ShardSession) -> None:
        self.guides.close(session)
        self._table.remove(session)

    def _ask_for_room(self, session: ShardSession, message: Open) -> None:
        request = batch.SessionRequest(
            session=session.session,
            peer=session.driver,
            prompt_tokens=session.prompt_tokens,
            max_tokens=session.max_tokens,
            names=split_names(message.names),
            replaces=SessionId(message.replaces) if message.replaces else None,
            deadline=self._clock() + (message.deadline_s or math.inf),
        )
        self._thread.open(request, session, *self._sampling_of(session))

    def _sampling_of(self, session: ShardSession) -> tuple[Sampling | None, PenaltyHistory | None]:
        return sampling_of(session.sampler) if self._is_tail else (None, None)

    def _fork(self, driver: PeerId, message: Fork) -> None:
        try:
            if self._is_draining:
                raise ShardDraining(peer=short_id(self._table.local))
            session = self._fork_session(driver, message)
        except PalsError as error:
            self._refuse(driver, SessionId(message.child), error)
            return
        self._begin(session)
        self._flows[session].begin(message.position)
        self._flows[session].held = message.position  # its rows may come at once

    def _fork_session(self, driver: PeerId, message: Fork) -> ShardSession:
        child = self._table.fork(driver, message, trio.current_time())
        parent, position = SessionId(message.session), message.position
        try:
            self.guides.open(child, trio.current_time())
            self._thread.fork(parent, child.session, position, child, *self._sampling_of(child))
        except PalsError:
            self._give_up(child)
            raise
        return child

    def _begin(self, session: ShardSession) -> None:
        """Let a session that was taken get its link onward, and its rows their windows."""
        self._flows[session] = self._build_flow(session)
        self._openings[session] = trio.CancelScope()
        self._nursery.start_soon(self._link_onward, session)

    def _find_stranger(self, message: Open) -> PeerId | None:
        """Return who of a chain is no member, before any of it is kept or dialled."""
        hops = (PeerId(hop.peer) for hop in message.chain)
        return next((peer for peer in hops if not self._links.is_member(peer)), None)

    async def _link_onward(self, session: ShardSession) -> None:
        """Link with the hop that rows go to, then let rows go there and say so.

        The prompt may be here before; what it makes waits for the link in its window.
        """
        onward: Hop = session.downstream or session.head
        scope = self._openings.get(session)
        if scope is None:
            return  # closed in the same breath
        with scope:
            try:
                await self._links.ensure(PeerId(onward.peer), onward.addresses)
            except PalsError as error:
                self._drop(session)
                self._refuse(session.driver, session.session, error, unreachable=onward.peer)
                return
            if self._openings.pop(session, None) is None:
                return  # ended while the link came up, too late for the scope to say so
            self._flows[session].is_linked = True
            self._go_on(session)
            self._say_opened(session)

    def _say_opened(self, session: ShardSession) -> None:
        """Tell the driver once a session has both its room and its link."""
        flow = self._flows.get(session)  # what went on just now may have ended it
        if flow is not None and flow.is_linked and flow.held is not None:
            opened = Opened(session=session.session, held=flow.held)
            self._send_control(session.driver, opened)

    def _refuse(
        self, driver: PeerId, session: SessionId, error: PalsError, *, unreachable: str = ""
    ) -> None:
        problem = str(error)[:512]
        self._early.note_over(session)
        refusal = Refused(session=session, code=error.code, problem=problem, peer=unreachable)
        self._send_control(driver, refusal)

    def _close(self, driver: PeerId, message: Close) -> None:
        session = self._table.close(session_of(message), driver)
        if session is not None:
            self._forget(session, split_names(message.names))

    def _drop(self, session: ShardSession) -> bool:
        """End a session here, and return whether that was not done before."""
        if not self._table.remove(session):
            return False
        self._forget(session)
        return True

    def _forget(self, session: ShardSession, names: tuple[bytes, ...] = ()) -> None:
        """Free the room of a session that is over, and drop what waits for it."""
        self._thread.close_session(session.session, names)
        self._early.note_over(session.session)
        self.guides.close(session)
        if (scope := self._openings.pop(session, None)) is not None:
            scope.cancel()
        self._flows.pop(session, None)
        self._timings.note_pause(session.session)
        if self._is_draining and not len(self._table):
            self._idle.set()

    def _fail(self, session: ShardSession, error: PalsError, *, lost: str = "") -> None:
        if self._drop(session):
            self._report(session, error.code, str(error), lost=lost)

    def _on_unsent(self, session: ShardSession, error: PalsError, peer: PeerId) -> None:
        self._fail(session, error, lost=peer)

    def _report(self, session: ShardSession, code: str, problem: str, *, lost: str = "") -> None:
        message = Failed(session=session.session, code=code, problem=problem[:512], peer=lost)
        self._send_control(session.driver, message)

    def _send_control(self, peer: PeerId, message: Control) -> None:
        try:
            self._outbound.send_control(peer, message)
        except PalsError as error:  # whoever asked is gone, and its sessions with it
            _log.debug("no answer to %s: %s", short_id(peer), error)

    # --- flow control ----------------------------------------------------------------

    def _build_flow(self, session: ShardSession) -> SessionFlow[InputRow]:
        return SessionFlow(
            inbound=AckPolicy(window_tokens(self._input)),
            window=window_tokens(self._output),
            acknowledged=session.prompt_tokens if self._is_tail else 0,
            passes_prompt=not self._is_tail,
        )

    def _take_ack(self, peer: PeerId, message: Ack) -> None:
        """Go on with what waited for room at the session's receiver."""
        session = self._table.get(session_of(message))
        if session is None or peer != session.receiver:
            return
        session.last_seen = trio.current_time()
        flow = self._flows[session]
        sent = session.prompt_tokens + session.sampled_tokens
        flow.acknowledge(min(message.position, sent))
        self._go_on(session)

    def _go_on(self, session: ShardSession) -> None:
        """Take up what waited, now that there may be room for what it makes."""
        flow = self._flows[session]
        self._tail.send_held(session)
        self._submit(flow.release())

    def _note_chunk(self, session: ShardSession, row: RowResult) -> None:
        """Tell the shard before this one what of a prompt is computed, where it may wait."""
        session.last_seen = trio.current_time()
        told = self._flows[session].inbound.take(row.end, session.prompt_tokens)
        if told is not None:
            self._send_control(session.upstream, Ack(session=session.session, position=told))

    # --- rows in ---------------------------------------------------------------------

    def on_rows(self, peer: PeerId, arrival: Arrival) -> None:
        """Check every row against its session and queue it for the compute thread."""
        frame = arrival.frame
        values = np.frombuffer(frame.payload, NUMPY_DTYPES[frame.shape.dtype])
        inputs = values if frame.shape.width == 1 else values.reshape(-1, frame.shape.width)
        is_sound = self._input.kind is not Kind.HIDDEN or are_sound(inputs)
        offset = 0
        ready: list[InputRow] = []
        for row in frame.rows:
            part = inputs[offset : offset + row.num_tokens]
            offset += row.num_tokens
            came = _Came(row, part, arrival.arrived_s, arrival.codec_s, is_sound)
            if frame.lane is Lane.PREFILL and self._table.get(row.session) is None:
                self._take_early(peer, came)
            else:
                ready += self._take_row(peer, frame.lane, came)
        self._submit(ready)

    def _take_early(self, peer: PeerId, came: _Came) -> None:
        """Keep a row whose `Open` may be on its way; one of a session that ended is late."""
        session, inputs = came.row.session, came.inputs
        if not self._early.is_over(session):
            kept = came._replace(inputs=inputs.copy())  # the rest of its frame need not wait
            self._early.keep(peer, session, kept, inputs.nbytes, trio.current_time())

    def _take_row(self, peer: PeerId, lane: Lane, came: _Came) -> Sequence[InputRow]:
        """Return what may run now that a row came: it, or of a prompt what waited before it."""
        session = self._admit_row(peer, lane, came.row)
        if session is None or not self._is_sound(peer, session, came):
            return ()
        item = _build_item(session, lane, came)
        if lane is Lane.DECODE:
            self._timings.note_arrival(session.session, came.arrived_s)
            return (item,)
        flow = self._flows[session]
        flow.waiting.append((came.row.position + came.row.num_tokens, item))
        return flow.release()

    def _admit_row(self, peer: PeerId, lane: Lane, row: Row) -> ShardSession | None:
        """Return the session that takes a row, having ended one that it does not fit.

        The link stays, for it carries other sessions, and ``peer`` need not be at fault: a
        driver may tell two shards different things, or open an id again under way.
        """
        try:
            session = self._table.take_row(peer, lane, row, trio.current_time())
            if session is not None and lane is Lane.PREFILL:
                self._check_window(peer, session, row)
        except InvalidFrame as error:
            session = self._table.get(row.session)
            if session is not None and peer in (session.upstream, session.ring_upstream):
                self._fail(session, error)
            else:
                _log.debug("row of a session of others: %s", error)
            return None
        return session

    def _check_window(self, peer: PeerId, session: ShardSession, row: Row) -> None:
        flow = self._flows[session]
        if not flow.has_begun:
            flow.begin(row.position)
        if not flow.fits_inbound(session.position):
            problem = f"a prompt more than {flow.inbound.window} tokens ahead"
            raise InvalidFrame(peer=peer, problem=problem)

    def _is_sound(self, peer: PeerId, session: ShardSession, came: _Came) -> bool:
        """Return whether a row can be computed on; if not, its session has ended."""
        if came.is_sound:
            return True
        try:
            check_states(peer, came.inputs, position=came.row.position)
        except InvalidActivation as error:
            _log.warning("%s", error)
            self._fail(session, error, lost=peer)
            return False
        return True

    def _submit(self, rows: Sequence[InputRow]) -> None:
        """Queue the rows that may run now; what a grammar guides may have to wait."""
        self._queue(self.guides.attach(rows))

    def _queue(self, rows: Sequence[InputRow]) -> None:
        """Queue rows for the compute thread; a session whose row does not fit ends."""
        if not rows:
            return
        for row, error in self._thread.add(rows):
            assert isinstance(row.owner, ShardSession)
            self._fail(row.owner, error)

    # --- what the compute thread says --------------------------------------------------

    def on_delivery(self, delivery: Delivery) -> None:
        """Take what happened to sessions, and a finished step; called on the trio thread."""
        for owner, event in delivery.events:
            assert isinstance(owner, ShardSession)
            if self._table.has(owner):  # else it was closed meanwhile
                self._take_event(owner, event)
        if delivery.result is not None and delivery.result.error is None:
            self._take_step(delivery.result)

    def _take_event(self, session: ShardSession, event: batch.Event) -> None:
        match event:
            case batch.Admitted(_, held):
                self._on_admitted(session, held)
            case batch.Refused(_, error):
                self._drop(session)
                self._refuse(session.driver, session.session, error)
            case batch.Preempted():
                self._drop(session)
                self._send_control(session.driver, Preempted(session=session.session))
            case batch.Ended(_, error):
                self._fail(session, error)

    def _on_admitted(self, session: ShardSession, held: int) -> None:
        """Let the prompt of a session run, and tell its driver where it may begin."""
        if session.is_fork:
            return  # it was told so, and its first row may have come
        flow = self._flows[session]
        flow.held = held
        self._say_opened(session)
        self._submit(flow.release())

    def _take_step(self, result: StepResult) -> None:
        """Send the outputs of a step on.

        The step of a session that ended meanwhile is for nobody, also not for another one
        that has its id by now.
        """
        self._timings.note_step(result, self._clock())
        sessions = [self._find(row) for row in result.rows]
        if self._is_tail:
            self._tail.send(result, sessions, trio.current_time())
        else:
            self._outbound.send_hidden(self._output, result, sessions)
        row, session = result.rows[-1], sessions[-1]
        if row.kind == "prefill" and session is not None and self._table.has(session):
            self._note_chunk(session, row)

    def _find(self, row: RowResult) -> ShardSession | None:
        """Return whose a row that has run is, unless that session has ended meanwhile."""
        session = row.owner
        assert isinstance(session, ShardSession)
        if not self._table.has(session):
            return None
        self._table.note_computed(session, row.position)
        return session


def _build_item(session: ShardSession, lane: Lane, came: _Came) -> InputRow:
    row = came.row
    kind: batch.RowKind = "decode" if row.num_tokens == 1 else "verify"
    if lane is Lane.PREFILL and not session.is_fork:
        kind = "prefill"
    return InputRow(
        owner=session,
        session=session.session,
        kind=kind,
        position=row.position,
        inputs=came.inputs,
        arrived_s=came.arrived_s,
        codec_s=came.codec_s,
    )
