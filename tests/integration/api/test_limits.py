from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest

from pals.api.protocol import ConnectionLimits
from tests.fakes import FakeDriver
from tests.integration.api.servers import running

HALF = b"GET /healthz HTTP/1.1\r\nHo"
REST = b"st: %s\r\n\r\n"
SOON = 10


class Client:
    """Raw connections to one server."""

    def __init__(self, url: str, stack: ExitStack) -> None:
        self.url = url
        self._stack = stack
        self._host = urlsplit(url).netloc.encode()

    def connect(self, data: bytes) -> socket.socket:
        host, _, port = self._host.partition(b":")
        raw = socket.socket()
        # So small that a stream which nobody reads fills it at once.
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.settimeout(SOON)
        raw.connect((host.decode(), int(port)))
        self._stack.enter_context(raw)
        # At a limit it may be closed before it has sent anything.
        with suppress(ConnectionError):
            raw.sendall(data.replace(b"%s", self._host))
        return raw

    def status(self) -> int:
        return httpx.get(f"{self.url}/healthz", timeout=SOON).status_code

    def rest(self) -> bytes:
        return REST.replace(b"%s", self._host)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def serve(stack: ExitStack, limits: ConnectionLimits, driver: FakeDriver | None = None) -> Client:
    url = stack.enter_context(running(driver or FakeDriver(), limits=limits))
    return Client(url, stack)


def is_answered(raw: socket.socket) -> bool:
    answer = b""
    while not answer.endswith(b'"ok"}'):
        answer += raw.recv(4096)
    return answer.startswith(b"HTTP/1.1 200 ")


def is_cut(raw: socket.socket) -> bool:
    try:
        return raw.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("sent", [b"", HALF])
def test_a_connection_that_sends_no_whole_head_is_cut(stack: ExitStack, sent: bytes) -> None:
    client = serve(stack, ConnectionLimits(head_s=0.2))

    assert is_cut(client.connect(sent))


def test_a_head_after_an_answer_has_the_same_deadline(stack: ExitStack) -> None:
    client = serve(stack, ConnectionLimits(head_s=0.5))
    raw = client.connect(HALF + REST)
    assert is_answered(raw)

    raw.sendall(HALF)

    assert is_cut(raw)


def test_half_requests_shut_nobody_out(stack: ExitStack) -> None:
    client = serve(stack, ConnectionLimits(head_s=600, per_loopback=20, total=10))
    slow = [client.connect(HALF) for _ in range(30)]

    assert client.status() == 200
    assert is_cut(slow[0])


def test_an_address_at_its_limit_loses_its_own_connections(stack: ExitStack) -> None:
    client = serve(stack, ConnectionLimits(head_s=600, per_loopback=3))
    slow = [client.connect(HALF) for _ in range(4)]

    assert is_cut(slow[0])
    slow[3].sendall(client.rest())
    assert is_answered(slow[3])


def test_a_running_answer_is_never_cut_for_a_new_connection(stack: ExitStack) -> None:
    driver = FakeDriver(["a"], end=None)
    client = serve(stack, ConnectionLimits(per_loopback=1), driver)
    stream = client.connect(chat_request())
    assert stream.recv(4096).startswith(b"HTTP/1.1 200 ")

    assert is_cut(client.connect(HALF))
    assert not driver.completions[0].closed.is_set()


def test_a_stream_that_nobody_reads_is_ended(stack: ExitStack) -> None:
    driver = FakeDriver(["x" * 50_000] * 1000)
    client = serve(stack, ConnectionLimits(write_s=0.2), driver)

    client.connect(chat_request())

    assert driver.asked.wait(SOON)
    assert driver.completions[0].closed.wait(SOON)
    assert driver.completions[0].completion_tokens < 1000


def chat_request() -> bytes:
    body = msgspec.json.encode(
        {
            "model": FakeDriver.model_id,
            "messages": [{"role": "user", "content": "hi"}],
            "stream": True,
        }
    )
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: %s\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
