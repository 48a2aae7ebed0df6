"""H7: clients that send or read so slowly that they would hold a server for nothing."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from pals.api.admission import Admission, Standing
from pals.api.gate import GateSettings
from pals.api.protocol import ConnectionLimits
from pals.api.waiting_line import LineLimits
from tests.attacks.raw_http import CHAT, CHAT_PATH, DEADLINE_S, Endpoint, answer_on, is_cut
from tests.fakes import FakeDriver
from tests.integration.api.servers import running
from tests.waiting import wait_until

BODY = json.dumps(CHAT | {"stream": True}).encode()
POST = (
    f"POST {CHAT_PATH} HTTP/1.1\r\nHost: %H\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(BODY)}\r\n\r\n"
).encode()
PATIENT = ConnectionLimits(head_s=600, write_s=600)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def opened(stack: ExitStack, endpoint: Endpoint, data: bytes) -> socket.socket:
    """Open a connection, send something, and read nothing."""
    raw = socket.socket()
    stack.enter_context(raw)
    # So small that a stream which nobody reads fills it at once.
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.settimeout(DEADLINE_S)
    host, _, port = endpoint.netloc.partition(":")
    raw.connect((host, int(port)))
    with suppress(ConnectionError):
        raw.sendall(data.replace(b"%H", endpoint.netloc.encode()))
    return raw


def drips_into(raw: socket.socket) -> int | None:
    """Send one more header, and return its length; None once the connection is cut."""
    try:
        return raw.send(b"X: y\r\n")
    except ConnectionError:
        return None


def test_h7_a_head_that_never_ends_has_a_deadline_however_it_drips(stack: ExitStack) -> None:
    url = stack.enter_context(running(FakeDriver(), limits=ConnectionLimits(head_s=0.3)))
    raw = opened(stack, Endpoint(url), b"GET / HTTP/1.1\r\n")

    wait_until(lambda: drips_into(raw) is None)


def test_h7_a_body_that_never_ends_has_a_deadline(stack: ExitStack) -> None:
    url = stack.enter_context(running(FakeDriver(), limits=PATIENT, body_s=0.3))
    raw = opened(stack, Endpoint(url), POST + BODY[:-1])

    answer = answer_on(raw)

    assert (answer.status, answer.code) == (408, "receive_timeout")


def test_h7_the_deadlines_are_the_promised_ones() -> None:
    limits = ConnectionLimits()

    assert (limits.head_s, limits.write_s) == (10.0, 30.0)
    assert GateSettings.for_bind("127.0.0.1", 1).body_s == 15.0


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHo", POST + BODY[:-1]])
def test_h7_150_slow_clients_shut_nobody_out(stack: ExitStack, sent: bytes) -> None:
    url = stack.enter_context(running(FakeDriver(), limits=PATIENT, body_s=600))
    endpoint = Endpoint(url)
    for _ in range(150):
        opened(stack, endpoint, sent)

    for _ in range(3):
        assert endpoint.post(CHAT).status == 200


def test_h7_16_streams_that_nobody_reads_are_ended_and_give_their_places_back(
    stack: ExitStack,
) -> None:
    driver = FakeDriver(["x" * 50_000] * 1000)
    admission = Admission(LineLimits(running=16, waiting=0))
    limits = ConnectionLimits(write_s=0.3)
    endpoint = Endpoint(stack.enter_context(running(driver, limits=limits, admission=admission)))

    unread = [opened(stack, endpoint, POST + BODY) for _ in range(16)]

    wait_until(lambda: len(driver.completions) == 16)
    for completion in driver.completions:
        assert completion.closed.wait(DEADLINE_S)
        assert completion.completion_tokens < 1000
    wait_until(lambda: admission.standing() == Standing(running=0, waiting=0))
    assert all(is_cut(raw) for raw in unread)


def test_h7_a_stream_that_is_dripped_out_of_the_buffer_is_ended_too(stack: ExitStack) -> None:
    driver = FakeDriver(["x" * 50_000] * 1000)
    limits = ConnectionLimits(write_s=0.3)
    endpoint = Endpoint(stack.enter_context(running(driver, limits=limits)))
    raw = opened(stack, endpoint, POST + BODY)
    assert driver.asked.wait(DEADLINE_S)

    while not driver.completions[0].closed.wait(0.02):
        raw.recv(1)

    assert driver.completions[0].completion_tokens < 1000


def test_h7_64_run_64_wait_and_the_next_is_told_so(stack: ExitStack) -> None:
    driver = FakeDriver(["a"], end=None)
    admission = Admission()
    endpoint = Endpoint(stack.enter_context(running(driver, admission=admission)))
    crowd = [opened(stack, endpoint, POST + BODY) for _ in range(128)]
    wait_until(lambda: admission.standing() == Standing(running=64, waiting=64))

    refused = endpoint.post(CHAT)

    assert (refused.status, refused.code) == (429, "rate_limit_exceeded")
    assert endpoint.ask("GET", "/v1/models").status == 200
    assert ConnectionLimits().per_address > len(crowd) + 2
    for raw in crowd[:64]:
        raw.close()
    wait_until(lambda: admission.standing() == Standing(running=64, waiting=0))


def test_h7_a_client_that_leaves_gives_its_place_to_the_next(stack: ExitStack) -> None:
    driver = FakeDriver(["a"], end=None)
    admission = Admission(LineLimits(running=1, waiting=1))
    endpoint = Endpoint(stack.enter_context(running(driver, admission=admission)))
    first = opened(stack, endpoint, POST + BODY)
    assert first.recv(15) == b"HTTP/1.1 200 OK"
    second = opened(stack, endpoint, POST + BODY)
    wait_until(lambda: admission.standing() == Standing(running=1, waiting=1))

    refused = endpoint.post(CHAT)
    first.close()

    assert (refused.status, refused.code) == (429, "rate_limit_exceeded")
    assert int(refused.headers["retry-after"]) >= 1
    assert second.recv(15) == b"HTTP/1.1 200 OK"


def test_h7_a_client_that_leaves_the_queue_asks_nothing_of_the_driver(stack: ExitStack) -> None:
    driver = FakeDriver(["a"], end=None)
    admission = Admission(LineLimits(running=1, waiting=1))
    endpoint = Endpoint(stack.enter_context(running(driver, admission=admission)))
    first = opened(stack, endpoint, POST + BODY)
    assert first.recv(15) == b"HTTP/1.1 200 OK"
    second = opened(stack, endpoint, POST + BODY)
    wait_until(lambda: admission.standing() == Standing(running=1, waiting=1))

    second.close()

    wait_until(lambda: admission.standing() == Standing(running=1, waiting=0))
    first.close()
    wait_until(lambda: admission.standing() == Standing(running=0, waiting=0))
    assert len(driver.calls) == 1
