"""The link emulator with real sockets: what goes in comes out, only later or not at all."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from benchmarks.link_emulator import Conditions, EmulatedLink, LinkEmulator, open_emulator

DEADLINE_S = 20.0
PROBE_S = 0.2


@pytest.fixture(scope="module")
def emulator() -> Iterator[LinkEmulator]:
    with open_emulator() as running:
        yield running


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        made.settimeout(DEADLINE_S)
        yield made


@pytest.fixture
def link(emulator: LinkEmulator, listener: socket.socket) -> EmulatedLink:
    return emulator.add(listener.getsockname()[1])


class Ends:
    """Both ends of one connection through a link."""

    def __init__(self, link: EmulatedLink, listener: socket.socket) -> None:
        self.dialler = socket.create_connection(("127.0.0.1", link.port), DEADLINE_S)
        self.target, _ = listener.accept()
        self.target.settimeout(DEADLINE_S)

    def close(self) -> None:
        self.dialler.close()
        self.target.close()


@pytest.fixture
def ends(link: EmulatedLink, listener: socket.socket) -> Iterator[Ends]:
    with closing(Ends(link, listener)) as made:
        yield made


def read_all(end: socket.socket) -> bytes:
    received = bytearray()
    while data := end.recv(1 << 16):
        received += data
    return bytes(received)


def assert_silent(end: socket.socket) -> None:
    end.settimeout(PROBE_S)
    with pytest.raises(TimeoutError):
        end.recv(1)
    end.settimeout(DEADLINE_S)


def test_a_bad_link_delivers_every_byte_in_order_and_the_end(
    link: EmulatedLink, ends: Ends
) -> None:
    link.shape(Conditions(delay_s=0.01, jitter_s=0.005, bytes_per_s=50e6, loss=0.001))
    sent = bytes(range(256)) * 8192

    def send() -> None:
        ends.dialler.sendall(sent)
        ends.dialler.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    received = read_all(ends.target)
    sender.join(DEADLINE_S)
    ends.target.sendall(b"answer")
    ends.target.shutdown(socket.SHUT_WR)
    assert received == sent
    assert read_all(ends.dialler) == b"answer"


def test_each_direction_has_its_own_delay(link: EmulatedLink, ends: Ends) -> None:
    link.shape(Conditions(delay_s=0.1), Conditions(delay_s=0.2))
    started_s = time.monotonic()
    ends.dialler.sendall(b"x")
    ends.target.recv(1)
    there_s = time.monotonic() - started_s
    ends.target.sendall(b"y")
    ends.dialler.recv(1)
    back_s = time.monotonic() - started_s - there_s
    assert there_s >= 0.1
    assert back_s >= 0.2


def test_a_held_direction_is_silent_and_the_other_is_not(link: EmulatedLink, ends: Ends) -> None:
    link.shape(Conditions(held=True), Conditions())
    ends.dialler.sendall(b"kept")
    ends.target.sendall(b"passes")
    assert ends.dialler.recv(6) == b"passes"
    assert_silent(ends.target)
    link.shape(Conditions())
    assert ends.target.recv(4) == b"kept"


def test_a_held_link_stops_its_sender_before_long(link: EmulatedLink, ends: Ends) -> None:
    link.shape(Conditions(held=True))
    ends.dialler.settimeout(PROBE_S)
    with pytest.raises(TimeoutError):
        ends.dialler.sendall(bytes(64 << 20))


def test_reset_ends_both_sides_at_once(link: EmulatedLink, ends: Ends) -> None:
    link.reset()
    for end in (ends.dialler, ends.target):
        with pytest.raises(ConnectionResetError):
            end.recv(1)


def test_a_target_that_does_not_listen_is_a_reset(
    link: EmulatedLink, listener: socket.socket
) -> None:
    listener.close()
    with (
        pytest.raises(ConnectionResetError),
        socket.create_connection(("127.0.0.1", link.port), DEADLINE_S) as dialler,
    ):
        dialler.recv(1)
