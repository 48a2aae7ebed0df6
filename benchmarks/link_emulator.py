"""Bad links on one machine: TCP proxies that delay, pace, stall, hold and reset.

No root and no kernel module: whoever dials a link's port reaches its target through it,
and each direction of it has its own `Conditions`. All links of a `LinkEmulator` are served
by one child process, so that the programs under test keep their own threads to themselves.
Setting up a TCP connection costs no delay, only the bytes on it do.
"""

from __future__ import annotations

import math
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import msgspec

SEGMENT_BYTES = 1400
RETRANSMISSION_S = 0.2
READ_BYTES = 1 << 16
BUFFER_BYTES = 1 << 20
CONNECT_DEADLINE_S = 5.0
SPIN_S = 0.0003
"""A wait ends this early and is finished awake: the system wakes up too late otherwise."""
_IMMEDIATE_RESET = struct.pack("ii", 1, 0)


class Conditions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What happens to the bytes of one direction; by default nothing.

    Attributes:
        delay_s: From the last byte's way through the bottleneck to its arrival.
        jitter_s: Standard deviation of the delay; the order of bytes is kept, as TCP does.
        bytes_per_s: Of the bottleneck, for each connection; 0 is no bottleneck.
        loss: Probability that a segment is lost, which TCP turns into a stall of
            `RETRANSMISSION_S` for it and all bytes behind it.
        held: Nothing arrives while this holds, and what was sent arrives after it.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float = 0.0
    loss: float = 0.0
    held: bool = False

    @property
    def buffer_bytes(self) -> int:
        """Bytes that may be under way before the sender is no longer read."""
        return BUFFER_BYTES + int(self.bytes_per_s * self.delay_s)


PERFECT = Conditions()


class Pacer:
    """Says when bytes arrive; pure but for its random generator."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._free_s = -math.inf
        self._last_due_s = -math.inf

    def due_s(self, conditions: Conditions, size: int, now_s: float) -> float:
        """Return when the last of ``size`` bytes that were sent now arrives."""
        self._free_s = max(now_s, self._free_s)
        if conditions.bytes_per_s:
            self._free_s += size / conditions.bytes_per_s
        due_s = self._free_s + self._delay_s(conditions, size)
        self._last_due_s = max(self._last_due_s, due_s)
        return self._last_due_s

    def _delay_s(self, conditions: Conditions, size: int) -> float:
        delay_s = conditions.delay_s
        if conditions.jitter_s:
            delay_s = max(0.0, self._rng.gauss(delay_s, conditions.jitter_s))
        segments = math.ceil(size / SEGMENT_BYTES)
        if conditions.loss and self._rng.random() < 1 - (1 - conditions.loss) ** segments:
            delay_s += RETRANSMISSION_S
        return delay_s


# --- the child process ---------------------------------------------------------------


class Add(msgspec.Struct, frozen=True, tag=True):
    """Make a link to a target; answered by its port."""

    host: str
    port: int


class Shape(msgspec.Struct, frozen=True, tag=True):
    """Change the conditions of a link, from the dialling side to the target and back."""

    link: int
    forward: Conditions
    backward: Conditions


class Reset(msgspec.Struct, frozen=True, tag=True):
    """Reset every connection of a link."""

    link: int


Command = Add | Shape | Reset


@dataclass(slots=True, kw_only=True)
class _Link:
    target: tuple[str, int]
    listener: socket.socket
    forward: Conditions = PERFECT
    backward: Conditions = PERFECT
    connections: list[_Connection] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class _Pipe:
    """One direction of one connection; an empty chunk is the end of the stream."""

    source: socket.socket
    sink: socket.socket
    pacer: Pacer
    waiting: deque[tuple[float, bytes]] = field(default_factory=deque)
    waiting_bytes: int = 0
    read_all: bool = False
    finished: bool = False

    def wants_to_read(self, conditions: Conditions) -> bool:
        return not self.read_all and self.waiting_bytes < conditions.buffer_bytes

    def read(self, conditions: Conditions) -> None:
        data = self.source.recv(READ_BYTES)
        self.read_all = not data
        self.waiting.append((self.pacer.due_s(conditions, len(data), time.monotonic()), data))
        self.waiting_bytes += len(data)

    def next_due_s(self, conditions: Conditions) -> float:
        return self.waiting[0][0] if self.waiting and not conditions.held else math.inf

    def write(self, now_s: float) -> None:
        """Send on what is due, as much of it as the sink takes."""
        while self.waiting and self.waiting[0][0] <= now_s:
            due_s, data = self.waiting.popleft()
            if not data:
                self.sink.shutdown(socket.SHUT_WR)
                self.finished = True
                return
            try:
                sent = self.sink.send(data)
            except BlockingIOError:
                sent = 0
            self.waiting_bytes -= sent
            if sent < len(data):
                self.waiting.appendleft((due_s, data[sent:]))
                return


@dataclass(slots=True, kw_only=True)
class _Connection:
    link: _Link
    forward: _Pipe
    backward: _Pipe

    def pipes(self) -> Iterator[tuple[_Pipe, Conditions]]:
        yield self.forward, self.link.forward
        yield self.backward, self.link.backward

    def end(self, *, reset: bool) -> None:
        self.link.connections.remove(self)
        for end in (self.forward.source, self.forward.sink):
            with suppress(OSError):
                if reset:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _IMMEDIATE_RESET)
                end.close()


class _Proxy:
    """The loop of the child process; it ends when standard input does."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._links: dict[int, _Link] = {}
        self._decoder: msgspec.json.Decoder[Command] = msgspec.json.Decoder(Command)
        self._commands = bytearray()

    def run(self) -> None:
        while self._serve_once():
            pass

    def _serve_once(self) -> bool:
        """Wait for whatever is next, and serve it; return whether to go on."""
        now_s = time.monotonic()
        readers: dict[socket.socket, _Pipe] = {}
        writers: dict[socket.socket, _Pipe] = {}
        next_s = math.inf
        for _, pipe, conditions in self._pipes():
            if pipe.wants_to_read(conditions):
                readers[pipe.source] = pipe
            due_s = pipe.next_due_s(conditions)
            if due_s <= now_s:
                writers[pipe.sink] = pipe
            else:
                next_s = min(next_s, due_s)
        listeners = [link.listener for link in self._links.values()]
        # select() alone of the system's waits takes microseconds from Python.
        ready, writable, _ = select.select(
            [sys.stdin.fileno(), *listeners, *readers],
            list(writers),
            [],
            None if next_s == math.inf else max(0.0, next_s - now_s - SPIN_S),
        )
        if not ready and not writable:
            while time.monotonic() < next_s:
                pass
        self._move({id(readers[s]) for s in ready if s in readers}, set(map(id, writable)))
        for link in self._links.values():
            if link.listener in ready:
                self._accept(link)
        return sys.stdin.fileno() not in ready or self._take_commands()

    def _pipes(self) -> Iterator[tuple[_Connection, _Pipe, Conditions]]:
        for link in self._links.values():
            for connection in tuple(link.connections):
                for pipe, conditions in connection.pipes():
                    yield connection, pipe, conditions

    def _move(self, readable: set[int], writable: set[int]) -> None:
        """Read from the pipes that can be, and write whatever is due by now."""
        for link in self._links.values():
            for connection in tuple(link.connections):
                try:
                    for pipe, conditions in connection.pipes():
                        if id(pipe) in readable:
                            pipe.read(conditions)
                        if not conditions.held:
                            pipe.write(time.monotonic())
                except OSError:
                    connection.end(reset=True)
                else:
                    if connection.forward.finished and connection.backward.finished:
                        connection.end(reset=False)

    def _accept(self, link: _Link) -> None:
        dialler, _ = link.listener.accept()
        try:
            target = socket.create_connection(link.target, CONNECT_DEADLINE_S)
        except OSError:
            dialler.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _IMMEDIATE_RESET)
            dialler.close()
            return
        for end in (dialler, target):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        forward = _Pipe(source=dialler, sink=target, pacer=Pacer(self._rng))
        backward = _Pipe(source=target, sink=dialler, pacer=Pacer(self._rng))
        link.connections.append(_Connection(link=link, forward=forward, backward=backward))

    def _take_commands(self) -> bool:
        data = os.read(sys.stdin.fileno(), READ_BYTES)
        self._commands += data
        *lines, rest = bytes(self._commands).split(b"\n")
        self._commands = bytearray(rest)
        for line in lines:
            answer = self._obey(self._decoder.decode(line))
            os.write(sys.stdout.fileno(), b"%d\n" % answer)
        return bool(data)

    def _obey(self, command: Command) -> int:
        match command:
            case Add():
                listener = socket.create_server(("127.0.0.1", 0))
                port: int = listener.getsockname()[1]
                self._links[port] = _Link(target=(command.host, command.port), listener=listener)
                return port
            case Shape():
                link = self._links[command.link]
                link.forward, link.backward = command.forward, command.backward
            case Reset():
                for connection in tuple(self._links[command.link].connections):
                    connection.end(reset=True)
        return 0


# --- the side of tests and benchmarks --------------------------------------------------


class EmulatedLink:
    """One link of a running `LinkEmulator`: dial ``127.0.0.1:port`` to go through it."""

    def __init__(self, emulator: LinkEmulator, port: int) -> None:
        self._emulator = emulator
        self.port = port

    def shape(self, forward: Conditions, backward: Conditions | None = None) -> None:
        """Change the conditions, of both directions alike unless ``backward`` is given.

        Bytes that are under way keep the delay that they were sent with.
        """
        self._emulator.ask(Shape(self.port, forward, forward if backward is None else backward))

    def reset(self) -> None:
        """Reset every connection, on both sides."""
        self._emulator.ask(Reset(self.port))


class LinkEmulator:
    """A running child process; made by `open_emulator`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def add(self, port: int, host: str = "127.0.0.1") -> EmulatedLink:
        """Return a new, perfect link to a target that need not listen yet."""
        return EmulatedLink(self, self.ask(Add(host, port)))

    def ask(self, command: Command) -> int:
        """Have the child obey a command, and return its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(command) + b"\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@contextmanager
def open_emulator() -> Generator[LinkEmulator]:
    """Run a child process that serves links until the block ends."""
    with subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the program that started it, which ends it
    ) as process:
        try:
            yield LinkEmulator(process)
        finally:
            process.kill()


if __name__ == "__main__":
    _Proxy(random.Random(0)).run()
