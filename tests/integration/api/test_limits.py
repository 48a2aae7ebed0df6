from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest

from pals.api.admission import Admission
from pals.api.protocol import ConnectionLimits
from pals.api.waiting_line import LineLimits
from tests.fakes import FakeDriver
from tests.integration.api.servers import running

HALF = b"GET /healthz HTTP/1.1\r\nHo"
REST = b"st: %s\r\n\r\n"
BROKEN = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nno length\r\n"
)
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


def is_hung_up_on(raw: socket.socket) -> bool:
    """Return whether the other side, which says nothing more, soon does not listen either."""
    until = time.monotonic() + SOON
    try:
        while time.monotonic() < until:
            raw.sendall(b"x")
    except ConnectionError:
        return True
    return False


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


def test_begun_requests_that_were_refused_shut_nobody_out(stack: ExitStack) -> None:
    client = serve(stack, ConnectionLimits(head_s=600, per_loopback=4))
    refused = [client.connect(BROKEN) for _ in range(4)]
    for raw in refused:
        assert raw.recv(4096).startswith(b"HTTP/1.1 400 ")

    assert client.status() == 200


def test_a_begun_request_that_was_refused_is_cut_in_time(stack: ExitStack) -> None:
    client = serve(stack, ConnectionLimits(head_s=0.2))
    raw = client.connect(BROKEN)
    assert raw.recv(4096).startswith(b"HTTP/1.1 400 ")

    assert is_hung_up_on(raw)


def test_a_body_to_an_open_path_needs_the_key_before_it_is_read(stack: ExitStack) -> None:
    url = stack.enter_context(running(FakeDriver(), api_key="a key of enough length"))
    head = b"POST /health HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\n"

    raw = Client(url, stack).connect(head + b"Content-Length: 9\r\n\r\n{")

    assert raw.recv(4096).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("path", ["//v1/chat/completions", "/v1%2fchat/completions"])
def test_no_spelling_of_a_path_gets_past_a_full_line(stack: ExitStack, path: str) -> None:
    driver = FakeDriver(["a"], end=None)
    admission = Admission(LineLimits(running=1, waiting=0))
    url = stack.enter_context(running(driver, admission=admission))
    client = Client(url, stack)
    assert client.connect(chat_request()).recv(4096).startswith(b"HTTP/1.1 200 ")

    refused = client.connect(chat_request(path=path))

    assert refused.recv(4096).startswith(b"HTTP/1.1 429 ")
    assert len(driver.completions) == 1


def test_a_client_that_goes_away_is_seen_behind_what_it_sent_ahead(stack: ExitStack) -> None:
    driver = FakeDriver(["a"], end=None)
    client = serve(stack, ConnectionLimits(), driver)
    raw = client.connect(chat_request(stream=False))
    assert driver.asked.wait(SOON)

    raw.sendall(HALF)
    raw.close()

    assert driver.completions[0].closed.wait(SOON)


def chat_request(*, stream: bool = True, path: str = "/v1/chat/completions") -> bytes:
    body = msgspec.json.encode(
        {
            "model": FakeDriver.model_id,
            "messages": [{"role": "user", "content": "hi"}],
            "stream": stream,
        }
    )
    head = (
        f"POST {path} HTTP/1.1\r\nHost: %s\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
