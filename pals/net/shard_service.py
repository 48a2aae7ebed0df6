"""The serving side of one shard: frames in, steps on the compute thread, frames out.

Runs on the trio thread. Every decision about a session is `SessionTable`'s; every step
is `ComputeThread`'s; this shell carries rows between them and keeps the timings.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import trio

from pals.engine.scheduler import WorkItem
from pals.engine.worker import ComputeThread, StepResult
from pals.errors import (
    InternalStepError,
    InvalidActivation,
    InvalidFrame,
    PalsError,
    SessionRefused,
    ShardDraining,
    ShardFull,
    ShardLost,
)
from pals.net.activations import check_states
from pals.net.control import (
    Ack,
    Close,
    Control,
    Draining,
    Failed,
    Hop,
    Open,
    Opened,
    Refused,
    StatsRequest,
    session_of,
)
from pals.net.early import EarlyRows
from pals.net.flow import AckPolicy, SessionFlow, window_bytes, window_tokens
from pals.net.links import Arrival, Links
from pals.net.outbound import Outbound, Tokens
from pals.net.ring import SessionTable, ShardSession
from pals.net.timings import StepTimings
from pals.net.wire import (
    CONTROL_SHAPE,
    NUMPY_DTYPES,
    FrameShape,
    Kind,
    Lane,
    Row,
    hidden_shape,
    sampled_shape,
    tokens_shape,
)
from pals.types import Dtype, LayerRange, PeerId, SessionId, short_id

_log = logging.getLogger(__name__)

EXPIRY_INTERVAL_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What the wire needs to know of a model.

    Attributes:
        manifest: SHA-256 of the model's files, 32 bytes.
        num_layers: Decoder layers of the whole model.
        hidden_size: Elements of one token's hidden state.
        dtype: In what the weights are kept, which decides the dtype on the wire.
    """

    manifest: bytes
    num_layers: int
    hidden_size: int
    dtype: Dtype

    def input_of(self, start: int) -> FrameShape:
        """Return the shape of what enters at layer ``start``: ids at 0, else hidden states."""
        if start == 0:
            return tokens_shape(self.manifest)
        return hidden_shape(self.manifest, start, self.dtype, self.hidden_size)

    def output_of(self, stop: int) -> FrameShape:
        """Return the shape of what leaves before layer ``stop``; at the end, sampled ids."""
        if stop == self.num_layers:
            return sampled_shape(self.manifest, self.num_layers)
        return self.input_of(stop)


class _Came(NamedTuple):
    """A received row: its inputs, when its frame came, and what opening that took."""

    row: Row
    inputs: npt.NDArray[np.generic]
    arrived_s: float
    codec_s: float


class ShardService:
    """One shard as the network sees it."""

    def __init__(
        self, links: Links, table: SessionTable, model: ModelShape, nursery: trio.Nursery
    ) -> None:
        self._links = links
        self._outbound = Outbound(links, self._on_unsent)
        self._table = table
        self._model = model
        self._nursery = nursery
        self._is_tail = table.layers.stop == model.num_layers
        self._input = model.input_of(table.layers.start)
        self._output = model.output_of(table.layers.stop)
        self._to_head = tokens_shape(model.manifest)
        self._compute: ComputeThread | None = None
        self._timings = StepTimings()
        self._flows: dict[ShardSession, SessionFlow[WorkItem]] = {}
        self._openings: dict[ShardSession, trio.CancelScope] = {}
        self._early: EarlyRows[_Came] = EarlyRows()
        self._is_draining = False
        self._idle = trio.Event()

    @property
    def layers(self) -> LayerRange:
        return self._table.layers

    @property
    def input_kind(self) -> Kind:
        return self._input.kind

    @property
    def free_sessions(self) -> int:
        return 0 if self._is_draining else self._table.free_slots

    @property
    def step_ms(self) -> float:
        return self._timings.step_ms

    @property
    def max_queued_bytes(self) -> int:
        """Bytes that wait for steps when every session's window is full."""
        return self._table.limits.max_sessions * window_bytes(self._input)

    def attach(self, compute: ComputeThread) -> None:
        self._compute = compute

    async def expire_sessions(self) -> None:
        """End sessions without traffic, until cancelled."""
        while True:
            await trio.sleep(EXPIRY_INTERVAL_S)
            self._early.expire(trio.current_time())
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
            case Close():
                self._close(peer, session_of(message))
            case Ack():
                self._take_ack(peer, message)
            case StatsRequest():
                stats = self._timings.to_stats(self._links.decode_seal_s)
                self._send_control(peer, stats)
            case _:
                pass

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
            if self._is_draining:
                raise ShardDraining(peer=short_id(self._table.local))
            session = self._admit_session(driver, message)
        except PalsError as error:
            self._refuse(driver, SessionId(message.session), error)
            return
        early = self._early.take(session.upstream, session.session)
        if early is None:
            self._table.remove(session)
            problem = "its prompt came too long before it, or with too many others"
            refusal = SessionRefused(peer=self._table.local, problem=problem)
            self._refuse(driver, session.session, refusal)
            return
        self._flows[session] = self._build_flow(session)
        self._openings[session] = trio.CancelScope()
        self._nursery.start_soon(self._link_onward, session)
        for came in early:
            self._take_row(session.upstream, Lane.PREFILL, came)

    def _admit_session(self, driver: PeerId, message: Open) -> ShardSession:
        """Take a session, for which one of a driver that has more than its share may end."""
        now = trio.current_time()
        try:
            return self._table.open(driver, message, now)
        except ShardFull as full:
            if (yielded := self._table.yield_slot(driver)) is None:
                raise
            self._fail(yielded, full)
            return self._table.open(driver, message, now)

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
                self._table.remove(session)
                self._forget(session)
                self._refuse(session.driver, session.session, error, unreachable=onward.peer)
                return
            if self._openings.pop(session, None) is None:
                return  # ended while the link came up, too late for the scope to say so
            self._flows[session].is_linked = True
            self._go_on(session)
            self._send_control(session.driver, Opened(session=session.session))

    def _refuse(
        self, driver: PeerId, session: SessionId, error: PalsError, *, unreachable: str = ""
    ) -> None:
        problem = str(error)[:512]
        self._early.note_over(session)
        refusal = Refused(session=session, code=error.code, problem=problem, peer=unreachable)
        self._send_control(driver, refusal)

    def _close(self, driver: PeerId, session_id: SessionId) -> None:
        session = self._table.close(session_id, driver)
        if session is not None:
            self._forget(session)

    def _forget(self, session: ShardSession) -> None:
        """Drop what waits for a session whose slot is free again."""
        assert self._compute is not None
        self._compute.drop(session)
        self._early.note_over(session.session)
        if (scope := self._openings.pop(session, None)) is not None:
            scope.cancel()
        self._flows.pop(session, None)
        self._timings.note_pause(session.session)
        if self._is_draining and not len(self._table):
            self._idle.set()

    def _fail(self, session: ShardSession, error: PalsError, *, lost: str = "") -> None:
        self._table.remove(session)
        self._forget(session)
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

    def _build_flow(self, session: ShardSession) -> SessionFlow[WorkItem]:
        return SessionFlow(
            inbound=AckPolicy(window_tokens(self._input)),
            window=window_tokens(self._output),
            acknowledged=session.prompt_tokens if self._is_tail else 0,
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
        self._submit(session, flow.release())
        if (held := flow.release_token()) is not None:
            to_head = Tokens()
            to_head.add(PeerId(session.head.peer), session, *held)
            self._outbound.send_tokens(self._to_head, to_head)

    def _note_chunk(self, session: ShardSession, item: WorkItem) -> None:
        """Tell the shard before this one what of a prompt is computed, where it may wait."""
        session.last_seen = trio.current_time()
        position = item.position + len(item.inputs)
        told = self._flows[session].inbound.take(position, session.prompt_tokens)
        if told is not None:
            self._send_control(session.upstream, Ack(session=session.session, position=told))

    # --- rows in ---------------------------------------------------------------------

    def on_rows(self, peer: PeerId, arrival: Arrival) -> None:
        """Check every row against its session and queue it for the compute thread."""
        assert self._compute is not None
        frame = arrival.frame
        values = np.frombuffer(frame.payload, NUMPY_DTYPES[frame.shape.dtype])
        inputs = values if frame.shape.width == 1 else values.reshape(-1, frame.shape.width)
        offset = 0
        for row in frame.rows:
            part = inputs[offset : offset + row.num_tokens]
            offset += row.num_tokens
            came = _Came(row, part, arrival.arrived_s, arrival.codec_s)
            if frame.lane is Lane.PREFILL and self._table.get(row.session) is None:
                self._take_early(peer, came)
            else:
                self._take_row(peer, frame.lane, came)

    def _take_early(self, peer: PeerId, came: _Came) -> None:
        """Keep a row whose `Open` may be on its way; one of a session that ended is late."""
        session, inputs = came.row.session, came.inputs
        if not self._early.is_over(session):
            kept = came._replace(inputs=inputs.copy())  # the rest of its frame need not wait
            self._early.keep(peer, session, kept, inputs.nbytes, trio.current_time())

    def _take_row(self, peer: PeerId, lane: Lane, came: _Came) -> None:
        session = self._admit_row(peer, lane, came.row)
        if session is not None and self._is_sound(peer, session, came):
            items = self._build_items(session, lane, came)
            self._submit(session, self._admit_items(session, lane, items))

    def _admit_row(self, peer: PeerId, lane: Lane, row: Row) -> ShardSession | None:
        """Return the session that takes a row, having ended one that it does not fit.

        The link stays, for it carries other sessions, and ``peer`` need not be at fault: a
        driver may tell two shards different things, or open an id again under way.
        """
        try:
            session = self._table.take_row(peer, lane, row, trio.current_time())
            if session is not None and lane is Lane.PREFILL:
                self._check_window(peer, session)
        except InvalidFrame as error:
            session = self._table.get(row.session)
            if session is not None and peer in (session.upstream, session.ring_upstream):
                self._fail(session, error)
            else:
                _log.debug("row of a session of others: %s", error)
            return None
        return session

    def _is_sound(self, peer: PeerId, session: ShardSession, came: _Came) -> bool:
        """Return whether a row can be computed on; if not, its session has ended."""
        if self._input.kind is not Kind.HIDDEN:
            return True
        try:
            check_states(peer, came.inputs, position=came.row.position)
        except InvalidActivation as error:
            _log.warning("%s", error)
            self._fail(session, error, lost=peer)
            return False
        return True

    def _check_window(self, peer: PeerId, session: ShardSession) -> None:
        flow = self._flows[session]
        if not flow.fits_inbound(session.position):
            problem = f"a prompt more than {flow.inbound.window} tokens ahead"
            raise InvalidFrame(peer=peer, problem=problem)

    def _admit_items(
        self, session: ShardSession, lane: Lane, items: list[WorkItem]
    ) -> list[WorkItem]:
        """Return those of ``items`` that may run; chunks whose output has no room wait."""
        if lane is Lane.DECODE or self._is_tail:
            return items
        flow = self._flows[session]
        flow.waiting += ((item.position + len(item.inputs), item) for item in items)
        return flow.release()

    def _submit(self, session: ShardSession, items: list[WorkItem]) -> None:
        assert self._compute is not None
        if not items:
            return
        try:
            self._compute.submit(items)
        except PalsError as error:
            self._fail(session, error)

    def _build_items(self, session: ShardSession, lane: Lane, came: _Came) -> list[WorkItem]:
        """Cut a row into steps of at most the chunk that this shard compiled for."""
        row, inputs, arrived_s, codec_s = came
        if lane is Lane.DECODE:
            self._timings.note_arrival(session.session, arrived_s)
        chunk = self._table.limits.max_chunk_tokens
        items: list[WorkItem] = []
        for start in range(0, row.num_tokens, chunk):
            part = inputs[start : start + chunk]
            end = row.position + start + len(part)
            samples = self._is_tail and end >= session.prompt_tokens
            items.append(
                WorkItem(
                    session=session,
                    slot=session.slot,
                    position=row.position + start,
                    inputs=part,
                    sampling=session.sampling if samples else None,
                    is_decode=lane is Lane.DECODE,
                    arrived_s=arrived_s,
                    codec_s=codec_s,
                )
            )
        return items

    # --- rows out --------------------------------------------------------------------

    def on_step(self, result: StepResult) -> None:
        """Send the outputs of a finished step on; called on the trio thread."""
        if result.error is not None:
            self._fail_step(result.items, result.error)
            return
        is_decode = result.items[0].is_decode
        if is_decode:
            self._timings.note_step(result, time.perf_counter())
        if self._is_tail:
            self._send_samples(result)
        else:
            sessions = [self._find(item) for item in result.items]
            self._outbound.send_hidden(self._output, result, sessions)
        if not is_decode and (session := self._find(result.items[0])) is not None:
            self._note_chunk(session, result.items[0])

    def _fail_step(self, items: Iterable[WorkItem], error: Exception) -> None:
        """End the sessions of a refused step, and all when it failed: the cache is gone."""
        if isinstance(error, PalsError):
            for item in items:
                session = self._find(item)
                if session is not None:
                    self._fail(session, error)
            return
        shown = InternalStepError(layers=self.layers)
        for session in self._table.remove_all():
            self._forget(session)
            self._report(session, shown.code, str(shown))

    def _find(self, item: WorkItem) -> ShardSession | None:
        """Return the item's session unless it ended while the step ran.

        Another session may have its id by now; the step's output is not for that one.
        """
        assert isinstance(item.session, ShardSession)
        session = item.session
        return session if self._table.get(session.session) is session else None

    def _send_samples(self, result: StepResult) -> None:
        """Send each sampled token to its driver and, unless it is the last, to the head.

        A driver that lags a window behind gets its token; the head gets it once that driver
        has caught up.
        """
        tokens: list[int] = result.outputs.tolist()
        if not tokens:
            return  # a chunk that is not its prompt's last
        to_heads, to_drivers = Tokens(), Tokens()
        for item, token in zip(result.items, tokens, strict=True):
            session = self._find(item)
            if session is None:
                continue
            is_last = self._table.take_sample(session, token)
            position = item.position + len(item.inputs)
            flow = self._flows[session]
            if not is_last and flow.has_room(position):
                to_heads.add(PeerId(session.head.peer), session, position, token)
            elif not is_last:
                flow.held_token = position, token
                self._timings.note_pause(session.session)
            to_drivers.add(session.driver, session, position, token, last=is_last)
        # The ring first: the driver only listens.
        self._outbound.send_tokens(self._to_head, to_heads)
        self._outbound.send_tokens(self._output, to_drivers)
