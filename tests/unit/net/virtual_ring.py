"""A ring of shard services in virtual time: links and steps take as long as a test says.

The services, their tables and their schedulers are the product's; only what takes real
time is not: sockets, and a model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import trio

from pals.engine.scheduler import Scheduler, WorkItem
from pals.engine.worker import ComputeThread, StepResult
from pals.net.control import Ack, Close, Control, Hop, Open, decode_control, encode_control
from pals.net.links import Arrival, Links
from pals.net.ring import SessionTable
from pals.net.shard_service import ModelShape, ShardService
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
from pals.types import EngineLimits, LayerRange, PeerId, SessionId

TOKEN = 7

Receive = Callable[[PeerId, Lane, Outgoing], None]
StepSeconds = Callable[[int, Sequence[WorkItem]], float]


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


class _WiredLinks:
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


class _SteppedCompute:
    """The product's scheduler, with steps that only take time."""

    def __init__(
        self, scheduler: Scheduler, seconds: Callable[[Sequence[WorkItem]], float], width: int
    ) -> None:
        self._scheduler = scheduler
        self._seconds = seconds
        self._width = width
        self._changed = trio.Event()
        self.most_waiting = 0

    def submit(self, items: list[WorkItem]) -> None:
        for item in items:
            self._scheduler.add(item)
        self.most_waiting = max(self.most_waiting, len(self._scheduler))
        self._changed.set()

    def drop(self, session: object) -> None:
        self._scheduler.drop(session)

    async def run(self, deliver: Callable[[StepResult], None]) -> None:
        while True:
            if not (items := self._scheduler.next_step()):
                self._changed = trio.Event()
                await self._changed.wait()
                continue
            await trio.sleep(self._seconds(items))
            outputs = np.concatenate([self._output_of(item) for item in items])
            deliver(StepResult(items=items, outputs=outputs, free_s=0, started_s=0, finished_s=0))

    def _output_of(self, item: WorkItem) -> np.ndarray:
        if self._width == 1:
            return np.full(0 if item.sampling is None else 1, TOKEN, np.int32)
        return np.ones((len(item.inputs), self._width), np.float32)


class VirtualRing:
    """A chain of shards of one layer each; drivers attach to it.

    Args:
        nursery: Runs lines and steps until cancelled.
        wires: Between all peers.
        shards: How many.
        step_s: Says for a shard's place in the chain how long a step of it takes.
        limits: Of every shard.
        hidden_size: Of the model, in float32.
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
    ) -> None:
        self.wires = wires
        self.model = ModelShape(
            manifest=b"m" * 32, num_layers=shards, hidden_size=hidden_size, dtype="f32"
        )
        self.inputs = [self.model.input_of(place) for place in range(shards)]
        self.peers = [PeerId(f"shard-{i}") for i in range(shards)]
        self.services: list[ShardService] = []
        self.computes: list[_SteppedCompute] = []
        for place, peer in enumerate(self.peers):
            table = SessionTable(
                local=peer,
                layers=LayerRange(place, place + 1),
                num_layers=shards,
                limits=limits,
                idle_s=60.0,
            )
            service = ShardService(
                cast("Links", _WiredLinks(peer, wires)), table, self.model, nursery
            )
            compute = _SteppedCompute(
                Scheduler(max_rows=limits.max_sessions, max_bytes=service.max_queued_bytes),
                lambda items, place=place: step_s(place, items),
                1 if place == shards - 1 else hidden_size,
            )
            service.attach(cast("ComputeThread", compute))
            nursery.start_soon(compute.run, service.on_step)
            wires.attach(peer, _receiver(service))
            self.services.append(service)
            self.computes.append(compute)

    def chain(self) -> tuple[Hop, ...]:
        return tuple(Hop(peer=p, start=i, stop=i + 1) for i, p in enumerate(self.peers))


def _payload_of(outgoing: Outgoing) -> memoryview:
    return memoryview(b"".join(outgoing.payload))


def _receiver(service: ShardService) -> Receive:
    def receive(sender: PeerId, lane: Lane, outgoing: Outgoing) -> None:
        if lane is Lane.CONTROL:
            service.on_control(sender, decode_control(sender, _payload_of(outgoing)))
            return
        frame = Frame(lane, outgoing.shape, outgoing.rows, _payload_of(outgoing))
        service.on_rows(sender, Arrival(frame, trio.current_time(), 0.0))

    return receive


class VirtualDriver:
    """Opens one session of a ring and notes when its tokens come.

    Attributes:
        arrivals_s: When each token came.
        answers: The control messages that came.
    """

    def __init__(self, name: str, ring: VirtualRing, *, acknowledges: bool = True) -> None:
        self.peer = PeerId(name)
        self.session = SessionId(name.encode().ljust(16, b"."))
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
