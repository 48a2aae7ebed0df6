"""A ring of shard services in virtual time: links and steps take as long as a test says.

The services, their tables and their batchers are the product's; only what takes real time
is not: sockets, threads, and a model.
"""

from __future__ import annotations

import struct
import sys
import zlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, cast

import numpy as np
import trio

from pals.engine.batch import BatchRules, SessionRequest, Step, StepRow
from pals.engine.batcher import Batcher
from pals.engine.buckets import BatchLimits, Buckets
from pals.engine.compute import ComputeThread
from pals.engine.compute_core import Compute, Planned
from pals.engine.pacing import StepCosts
from pals.engine.pages import PageFormat, PagePool
from pals.engine.prefix import PrefixScope
from pals.engine.work import (
    Array,
    Delivery,
    InputRow,
    PenaltyHistory,
    RefusedRow,
    RowSampling,
    StepOutput,
    StepResult,
)
from pals.net.control import Ack, Close, Control, Hop, Open, decode_control, encode_control
from pals.net.links import Arrival, Links
from pals.net.model_shape import ModelShape
from pals.net.ring import SessionTable
from pals.net.shard_service import ShardService
from pals.net.wire import (
    CONTROL_SHAPE,
    NO_ROWS,
    Frame,
    Kind,
    Lane,
    Outgoing,
    Row,
    Rows,
    tokens_shape,
)
from pals.types import EngineLimits, LayerRange, PeerId, Sampling, SessionId
from tests.unit.engine.page_memory import PageMemory
from tests.unit.net.shard_fakes import make_sampled

Receive = Callable[[PeerId, Lane, Outgoing], None]


class Role(Protocol):
    """Who takes frames: a shard's service, or a driver's client."""

    def on_control(self, peer: PeerId, message: Control) -> None: ...

    def on_rows(self, peer: PeerId, arrival: Arrival) -> None: ...


StepSeconds = Callable[[int, Step], float]


class Wires:
    """One line for each direction between two peers, all alike but where a test says more.

    What one lane carries stays in order; lanes overtake each other.

    Attributes:
        delay_s: Of every line.
        delays_s: Of one lane of a line, where it is another.
        bytes_per_s: Of every line.
        most_bytes: The most payload that was ever under way on a line.
    """

    def __init__(self, nursery: trio.Nursery, *, delay_s: float, bytes_per_s: float) -> None:
        self.delay_s = delay_s
        self.delays_s: dict[tuple[PeerId, PeerId, Lane], float] = {}
        self.bytes_per_s = bytes_per_s
        self.most_bytes: defaultdict[tuple[PeerId, PeerId], int] = defaultdict(int)
        self._nursery = nursery
        self._ends: dict[PeerId, Receive] = {}
        self._free_s: defaultdict[tuple[PeerId, PeerId], float] = defaultdict(float)
        self._bytes: defaultdict[tuple[PeerId, PeerId], int] = defaultdict(int)
        self._lanes: dict[
            tuple[PeerId, PeerId, Lane], trio.MemorySendChannel[tuple[float, Outgoing]]
        ] = {}

    def attach(self, peer: PeerId, receive: Receive) -> None:
        self._ends[peer] = receive

    def send(self, sender: PeerId, receiver: PeerId, lane: Lane, outgoing: Outgoing) -> None:
        line, lane_of = (sender, receiver), (sender, receiver, lane)
        if lane_of not in self._lanes:
            self._lanes[lane_of], channel = trio.open_memory_channel[tuple[float, Outgoing]](10_000)
            self._nursery.start_soon(self._carry, lane_of, channel)
        size = sum(map(len, outgoing.payload))
        self._bytes[line] += size
        self.most_bytes[line] = max(self.most_bytes[line], self._bytes[line])
        start_s = max(trio.current_time(), self._free_s[line])
        self._free_s[line] = start_s + size / self.bytes_per_s
        due_s = self._free_s[line] + self.delays_s.get(lane_of, self.delay_s)
        self._lanes[lane_of].send_nowait((due_s, outgoing))

    async def _carry(
        self,
        lane_of: tuple[PeerId, PeerId, Lane],
        channel: trio.MemoryReceiveChannel[tuple[float, Outgoing]],
    ) -> None:
        sender, receiver, lane = lane_of
        async for due_s, outgoing in channel:
            await trio.sleep_until(due_s)
            self._bytes[sender, receiver] -= sum(map(len, outgoing.payload))
            self._ends[receiver](sender, lane, outgoing)


class WiredLinks:
    """What a shard service needs of `Links`."""

    def __init__(self, local: PeerId, wires: Wires) -> None:
        self._local = local
        self._wires = wires
        self.decode_seal_s: list[float] = []

    def is_member(self, peer: PeerId) -> bool:
        return True

    async def ensure(self, peer: PeerId, addresses: Sequence[str]) -> None:
        await trio.lowlevel.checkpoint()

    def send(self, peer: PeerId, lane: Lane, outgoing: Outgoing) -> None:
        self._wires.send(self._local, peer, lane, outgoing)


class TokenModel:
    """One shard of a model whose every token depends on all tokens before it, at every shard.

    A state is the token's id plus one and a digest of what the shards before this one have
    kept of all tokens so far: small whole numbers, which float32 holds exactly. A page that is
    lost, shared wrongly or overwritten anywhere changes all tokens that follow.
    """

    def __init__(self, num_pages: int, page_tokens: int, *, width: int, is_tail: bool) -> None:
        self._memory = PageMemory(num_pages, page_tokens)
        self._width = width
        self._is_tail = is_tail

    def run(self, planned: Planned) -> StepOutput:
        step = planned.step
        self._memory.copy(step.copies)
        rows = [
            self._run_row(row, inputs)
            for row, inputs in zip(step.all_rows, planned.inputs, strict=True)
        ]
        if not self._is_tail:
            return StepOutput(np.concatenate([self._to_states(row) for row in rows]), None)
        ids: list[int] = []
        for result, row, sampling in zip(planned.rows, rows, planned.samplings, strict=True):
            if result.outputs:
                assert sampling is not None
                seed = sampling.sampling.seed
                ids += [draw(digest, seed) for _, digest in row[-result.outputs :]]
        return StepOutput(None, make_sampled(ids))

    def _run_row(self, row: StepRow, inputs: Array) -> list[tuple[int, int]]:
        """Return the ids of a row and the digests of all that was kept up to each of them."""
        states = _states_of(inputs)
        crc = zlib.crc32(array("I", self._memory.read(row.pages, row.position)))
        kept = [keep(*state) for state in states]
        self._memory.write(row.pages, row.position, kept)
        result: list[tuple[int, int]] = []
        for (token, _), number in zip(states, kept, strict=True):
            crc = extend(crc, number)
            result.append((token, crc >> 10))
        return result

    def _to_states(self, row: Sequence[tuple[int, int]]) -> np.ndarray:
        states = np.zeros((len(row), self._width), np.float32)
        states[:, 0] = [token + 1 for token, _ in row]
        states[:, 1] = [digest for _, digest in row]
        return states


def _states_of(inputs: Array) -> list[tuple[int, int]]:
    if inputs.ndim == 1:
        return [(token, 0) for token in inputs.tolist()]
    return [(int(one) - 1, int(digest)) for one, digest in inputs[:, :2].tolist()]


def keep(token: int, digest: int) -> int:
    """Return what a shard keeps of a token."""
    return zlib.crc32(struct.pack("<ii", token, digest)) >> 1


def extend(crc: int, kept: int) -> int:
    """Return the checksum of what was kept of all tokens, with one more."""
    return zlib.crc32(kept.to_bytes(4, sys.byteorder), crc)


def draw(digest: int, seed: int) -> int:
    """Return the token that the tail makes of all that it has kept."""
    return zlib.crc32(array("Q", [digest, seed])) % 997


def tokens_of_a_chain(shards: int, prompt: Sequence[int], count: int, seed: int = 0) -> list[int]:
    """Return what a chain answers that serves nobody else and loses nothing."""
    crcs, digest = [0] * shards, 0
    answer: list[int] = []
    for token in prompt:
        digest = _pass_on(crcs, token)
    while len(answer) < count:
        answer.append(draw(digest, seed))
        digest = _pass_on(crcs, answer[-1])
    return answer


def _pass_on(crcs: list[int], token: int) -> int:
    """Let a token pass all shards, and return what the last one makes of it."""
    digest = 0
    for place, crc in enumerate(crcs):
        crcs[place] = extend(crc, keep(token, digest))
        digest = crcs[place] >> 10
    return digest


def make_batcher(limits: EngineLimits, num_pages: int, rules: BatchRules | None = None) -> Batcher:
    """Return a batcher over a pool of some pages."""
    size = PageFormat(page_tokens=limits.page_tokens, token_bytes=1)
    scope = PrefixScope(manifest=b"m" * 32, layers=LayerRange(0, 1), dtype="f32", kv_dtype="f32")
    pool = PagePool(size, budget_bytes=(num_pages + 1) * size.page_bytes, scope=scope)
    buckets = Buckets(BatchLimits.of(limits))
    costs = StepCosts({program: 0.01 + 0.001 * program.tokens for program in buckets.programs})
    rules = rules or BatchRules(max_sessions=limits.max_sessions)
    return Batcher(buckets, pool, rules, costs)


class SteppedCompute:
    """The product's core of the compute thread, with steps that only take virtual time.

    Attributes:
        core: Sessions, rows and pages.
        steps: That have run.
        most_queued_bytes: That ever waited.
    """

    def __init__(self, core: Compute, model: TokenModel, seconds: Callable[[Step], float]) -> None:
        self.core = core
        self.steps: list[Step] = []
        self.most_queued_bytes = 0
        self._model = model
        self._seconds = seconds
        self._changed = trio.Event()
        self._victims: list[SessionId] = []

    @property
    def free_tokens(self) -> int:
        return self.core.batcher.free_tokens

    def open(
        self,
        request: SessionRequest,
        owner: Hashable,
        sampling: Sampling | None = None,
        history: PenaltyHistory | None = None,
    ) -> None:
        self.core.open(request, owner, sampling, history, trio.current_time())
        self._changed.set()

    def fork(
        self,
        parent: SessionId,
        child: SessionId,
        position: int,
        owner: Hashable,
        sampling: Sampling | None = None,
        history: PenaltyHistory | None = None,
    ) -> None:
        now = trio.current_time()
        self.core.fork(parent, child, position, owner, sampling, history, now)
        self._changed.set()

    def close_session(self, session: SessionId, names: tuple[bytes, ...] = ()) -> None:
        self.core.close_session(session, names)
        self._changed.set()

    def add(self, rows: Sequence[InputRow]) -> list[RefusedRow]:
        refused = self.core.add(rows, trio.current_time())
        self.most_queued_bytes = max(self.most_queued_bytes, self.core.queued_bytes)
        self._changed.set()
        return refused

    def preempt(self, session: SessionId) -> None:
        """Take a session's pages before the next step, as if others needed them."""
        self._victims.append(session)
        self._changed.set()

    async def run(self, deliver: Callable[[Delivery], None]) -> None:
        while True:
            self._changed = trio.Event()
            planned = self._plan(deliver)
            if planned is None:
                wake_at = max(self.core.batcher.next_at(), trio.current_time() + 1e-6)
                with trio.move_on_at(wake_at):
                    await self._changed.wait()
                continue
            seconds = self._seconds(planned.step)
            started_s = trio.current_time()
            output = self._model.run(planned)
            self.steps.append(planned.step)
            await trio.sleep(seconds)
            deliver(Delivery(events=(), result=_build_result(planned, output, started_s)))
            self.core.finish(planned, seconds)

    def _plan(self, deliver: Callable[[Delivery], None]) -> Planned | None:
        while (changes := self.core.take_changes()) is not None:
            for member in changes.opened:
                assert member.sampling is not None
                self.core.set_sampling(member, RowSampling(member.sampling, 0))
        sessions = self.core.batcher._sessions
        for victim in self._victims:
            if victim in sessions.running:
                sessions._preempt(sessions.running[victim])
        self._victims.clear()
        planned, events = self.core.plan(trio.current_time())
        if events:
            deliver(Delivery(events=events, result=None))
        return planned


def _build_result(planned: Planned, output: StepOutput, started_s: float) -> StepResult:
    return StepResult(
        rows=planned.rows,
        output=output,
        free_s=started_s,
        started_s=started_s,
        finished_s=trio.current_time(),
    )


class VirtualRing:
    """A chain of shards of one layer each; drivers attach to it.

    Args:
        nursery: Runs lines and steps until cancelled.
        wires: Between all peers.
        shards: How many.
        step_s: Says for a shard's place in the chain how long a step of it takes.
        limits: Of every shard.
        hidden_size: Of the model, in float32.
        num_pages: Of each shard; by default as many as its sessions may have together.
        rules: Of every shard's batcher.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        wires: Wires,
        *,
        shards: int,
        step_s: StepSeconds,
        limits: EngineLimits,
        hidden_size: int,
        num_pages: Sequence[int] | None = None,
        rules: BatchRules | None = None,
    ) -> None:
        self.wires = wires
        self.limits = limits
        self.model = ModelShape(
            manifest=b"m" * 32, num_layers=shards, hidden_size=hidden_size, dtype="f32"
        )
        self.inputs = [self.model.input_of(place) for place in range(shards)]
        self.peers = [PeerId(f"shard-{i}") for i in range(shards)]
        self.services: list[ShardService] = []
        self.computes: list[SteppedCompute] = []
        most = limits.max_sessions * limits.max_context_tokens // limits.page_tokens
        for place, pages in enumerate(num_pages or [most] * shards):
            batcher = make_batcher(limits, pages, rules)
            self._add_shard(nursery, place, batcher, pages, lambda step, p=place: step_s(p, step))

    def _add_shard(
        self,
        nursery: trio.Nursery,
        place: int,
        batcher: Batcher,
        pages: int,
        seconds: Callable[[Step], float],
    ) -> None:
        peer, layers = self.peers[place], LayerRange(place, place + 1)
        table = SessionTable(
            local=peer,
            layers=layers,
            num_layers=self.model.num_layers,
            limits=self.limits,
            idle_s=60.0,
        )
        links = cast("Links", WiredLinks(peer, self.wires))
        service = ShardService(links, table, self.model, nursery, clock=trio.current_time)
        is_tail = layers.stop == self.model.num_layers
        core = Compute(batcher, is_tail=is_tail, max_queued_bytes=service.max_queued_bytes)
        width = self.model.hidden_size
        model = TokenModel(pages, self.limits.page_tokens, width=width, is_tail=is_tail)
        compute = SteppedCompute(core, model, seconds)
        service.attach(cast("ComputeThread", compute))
        nursery.start_soon(compute.run, service.on_delivery)
        self.wires.attach(peer, receiver_of(service))
        self.services.append(service)
        self.computes.append(compute)

    def chain(self) -> tuple[Hop, ...]:
        return tuple(Hop(peer=p, start=i, stop=i + 1) for i, p in enumerate(self.peers))


def _payload_of(outgoing: Outgoing) -> memoryview:
    return memoryview(b"".join(outgoing.payload))


def receiver_of(role: Role) -> Receive:
    """Return what gives a role the frames that come for it."""

    def receive(sender: PeerId, lane: Lane, outgoing: Outgoing) -> None:
        if lane is Lane.CONTROL:
            role.on_control(sender, decode_control(sender, _payload_of(outgoing)))
            return
        frame = Frame(lane, outgoing.shape, outgoing.rows, _payload_of(outgoing))
        role.on_rows(sender, Arrival(frame, trio.current_time(), 0.0))

    return receive


class VirtualDriver:
    """Opens one session of a ring and notes when its tokens come.

    Attributes:
        arrivals_s: When each token came.
        answers: The control messages that came.
    """

    def __init__(
        self, name: str, ring: VirtualRing, *, acknowledges: bool = True, number: int = 0
    ) -> None:
        self.peer = PeerId(name)
        self.session = SessionId(name.encode().ljust(12, b".") + number.to_bytes(4, "big"))
        self.arrivals_s: list[float] = []
        self.answers: list[Control] = []
        self._ring = ring
        self._acknowledges = acknowledges
        self._position = 0
        self._opened = trio.Event()
        self._finished = trio.Event()
        ring.wires.attach(self.peer, self._receive)

    async def open(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """Open the session and return once it is open at every shard."""
        self.ask(prompt_tokens, max_new_tokens)
        await self._opened.wait()

    def ask(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """Ask every shard to open the session."""
        self._position, self._max_new_tokens = prompt_tokens, max_new_tokens
        message = Open(
            session=self.session,
            chain=self._ring.chain(),
            prompt_tokens=prompt_tokens,
            max_new_tokens=max_new_tokens,
        )
        for peer in self._ring.peers:
            self._send_control(peer, message)

    def send_prompt(self, row_tokens: int) -> None:
        """Send the whole prompt to the head, in rows of ``row_tokens``."""
        shape = tokens_shape(self._ring.model.manifest)
        for start in range(0, self._position, row_tokens):
            count = min(row_tokens, self._position - start)
            row = Row(self.session, start, count)
            outgoing = Outgoing(shape, Rows.of(row), (bytes(4 * count),))
            self._ring.wires.send(self.peer, self._ring.peers[0], Lane.PREFILL, outgoing)

    async def finish(self) -> None:
        await self._finished.wait()

    def close(self) -> None:
        for peer in self._ring.peers:
            self._send_control(peer, Close(session=self.session))

    def acknowledge(self, sender: PeerId | None = None) -> None:
        """Say that every token so far is taken, by default in the driver's own name."""
        position = self._position + len(self.arrivals_s)
        message = encode_control(Ack(session=self.session, position=position))
        outgoing = Outgoing(CONTROL_SHAPE, NO_ROWS, (message,))
        tail = self._ring.peers[-1]
        self._ring.wires.send(sender or self.peer, tail, Lane.CONTROL, outgoing)

    def _receive(self, sender: PeerId, lane: Lane, outgoing: Outgoing) -> None:
        if outgoing.shape.kind is Kind.CONTROL:
            self.answers.append(decode_control(sender, _payload_of(outgoing)))
            if len(self.answers) == len(self._ring.peers):
                self._opened.set()
            return
        self.arrivals_s.append(trio.current_time())
        if self._acknowledges:
            self.acknowledge()
        if len(self.arrivals_s) == self._max_new_tokens:
            self._finished.set()

    def send_chunk(self, place: int, sender: PeerId, row: Row) -> None:
        """Send a part of the prompt past its chain, in another peer's name."""
        payload = b"\1" * row.num_tokens * self._ring.inputs[place].token_bytes
        outgoing = Outgoing(self._ring.inputs[place], Rows.of(row), (payload,))
        self._ring.wires.send(sender, self._ring.peers[place], Lane.PREFILL, outgoing)

    def _send_control(self, peer: PeerId, message: Control) -> None:
        outgoing = Outgoing(CONTROL_SHAPE, NO_ROWS, (encode_control(message),))
        self._ring.wires.send(self.peer, peer, Lane.CONTROL, outgoing)
