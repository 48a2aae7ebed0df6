"""What the link emulator costs beside the delay that it was asked for."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

from benchmarks.link_emulator import Conditions, LinkEmulator

ROUND_TRIPS = 20
DELAY_S = 0.025
DEADLINE_S = 10.0


def measure_error_ms(emulator: LinkEmulator) -> list[float]:
    """Return by how many milliseconds each of some messages comes late, one way.

    A message and its answer are compared with the delay of both ways and with the same
    exchange on plain loopback.
    """
    with _echo_server() as port:
        link = emulator.add(port)
        link.shape(Conditions(delay_s=DELAY_S))
        plain_s = sorted(_round_trips_s(port))[ROUND_TRIPS // 2]
        return [1000 * ((took_s - plain_s) / 2 - DELAY_S) for took_s in _round_trips_s(link.port)]


def _round_trips_s(port: int) -> list[float]:
    took_s: list[float] = []
    with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(ROUND_TRIPS):
            started_s = time.perf_counter()
            connection.sendall(b"x")
            connection.recv(1)
            took_s.append(time.perf_counter() - started_s)
    return took_s


@contextmanager
def _echo_server() -> Generator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_echo, args=(listener,), daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(DEADLINE_S)


def _echo(listener: socket.socket) -> None:
    """Serve one connection beside the emulator, and one through it."""
    for _ in range(2):
        connection, _ = listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := connection.recv(1):
                connection.sendall(data)
