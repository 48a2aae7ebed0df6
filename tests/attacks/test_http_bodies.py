"""H5 and H6: bodies that ask for too much, never end, or end in two places."""

from __future__ import annotations

import gzip
import json
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from tests.attacks.http_child import Child, started
from tests.attacks.raw_http import CHAT, CHAT_PATH, DEADLINE_S, Endpoint, answer_on
from tests.fakes import FakeDriver
from tests.integration.api.servers import running

HEAD = f"POST {CHAT_PATH} HTTP/1.1\r\nHost: %H\r\nContent-Type: application/json\r\n".encode()
SLACK_BYTES = 32 << 20
MIB = 1 << 20
BLOW_UPS: list[dict[str, Any]] = [
    {"n": 10**9},
    {"n": 10**30},
    {"n": 0},
    {"n": -1},
    {"n": 1.5},
    {"n": "1"},
    {"n": [1]},
    {"max_tokens": -1},
    {"max_tokens": 0},
    {"max_completion_tokens": -(2**63)},
    {"temperature": 10**30},
    {"top_logprobs": 10**6},
    {"stop": ["x"] * 5},
    {"logit_bias": {"x": 1}},
    {"messages": []},
]


@pytest.fixture(scope="module")
def driver() -> FakeDriver:
    return FakeDriver()


@pytest.fixture(scope="module")
def endpoint(driver: FakeDriver) -> Iterator[Endpoint]:
    with running(driver) as url:
        yield Endpoint(url)


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    with started(tmp_path_factory.mktemp("profile")) as child:
        yield child


@pytest.mark.parametrize("extra", BLOW_UPS, ids=str)
def test_h5_what_asks_for_too_much_is_refused_before_any_work(
    endpoint: Endpoint, driver: FakeDriver, extra: dict[str, Any]
) -> None:
    driver.calls.clear()

    answer = endpoint.post(CHAT | extra)

    assert answer.status == 400
    assert answer.code
    assert not driver.calls


def test_h5_no_more_candidates_are_made_than_are_wanted(
    endpoint: Endpoint, driver: FakeDriver
) -> None:
    driver.calls.clear()

    for extra in ({"best_of": 10**9}, {"best_of": -1}, {"n": 10**9}):
        answer = endpoint.post(
            {"model": "test/tiny", "prompt": "hi"} | extra, path="/v1/completions"
        )
        assert 400 <= answer.status < 500
        assert answer.code
    assert not driver.calls


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'"' + b"a" * MIB,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 65 + b"]" * 65,
        b'{"model": "test/tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"temperature": NaN, "model": "test/tiny", "messages": []}',
        b'{"temperature": 1e999, "model": "test/tiny", "messages": []}',
        b'{"n": ' + b"9" * 100_000 + b"}",
        json.dumps(CHAT | {"messages": [{"role": "user"}] * 100_000}).encode(),
    ],
    ids=range(13),
)
def test_h5_a_malformed_body_gets_the_error_object(endpoint: Endpoint, body: bytes) -> None:
    answer = endpoint.post(body)

    assert answer.status == 400
    assert answer.code
    assert b"Traceback" not in answer.body


def test_h6_a_body_that_says_it_is_too_long_is_refused_unread(endpoint: Endpoint) -> None:
    answer = endpoint.send(HEAD + b"Content-Length: 67108864\r\nExpect: 100-continue\r\n\r\n")

    assert (answer.status, answer.code) == (413, "body_too_large")


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of another process")
def test_h6_no_body_costs_more_memory_than_the_limit(child: Child) -> None:
    endpoint = child.endpoint
    assert endpoint.post(CHAT).status == 200
    before = child.peak_bytes()

    whole = pour(endpoint, HEAD + b"Content-Length: 67108864\r\n\r\n", b" " * MIB, 64)
    chunks = pour(endpoint, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunk(b" " * MIB), 64)
    small = pour(endpoint, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunk(b" ") * 50_000, 200)

    assert (whole, chunks, small) == (413, 413, 400)
    assert child.peak_bytes() - before < SLACK_BYTES


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "identity, gzip"])
def test_h6_a_compressed_body_is_refused_unread(endpoint: Endpoint, encoding: str) -> None:
    bomb = gzip.compress(b" " * (8 * MIB))

    answer = endpoint.post(bomb, f"Content-Encoding: {encoding}")

    assert (answer.status, answer.code) == (415, "unsupported_media_type")


SMUGGLED = b"GET /v1/models HTTP/1.1\r\nHost: %H\r\n\r\n"


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: 5\r\nContent-Length: 5\r\n",
        b"Content-Length: 5, 5\r\n",
        b"Content-Length: +5\r\n",
        b"Content-Length: -5\r\n",
        b"Content-Length: 0x5\r\n",
        b"Content-Length : 5\r\n",
        b"Content-Length: 5\r\n 0\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding:\x0bchunked\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"X: y\nContent-Length: 5\r\n",
        b"X: y\rContent-Length: 5\r\n",
        b"X: y\x00\r\n",
    ],
)
def test_h6_a_body_that_may_end_in_two_places_is_refused_and_nothing_behind_it_read(
    endpoint: Endpoint, framing: bytes
) -> None:
    with endpoint.connect() as raw:
        data = HEAD + framing + b"\r\n0\r\n\r\n" + SMUGGLED
        raw.sendall(data.replace(b"%H", endpoint.netloc.encode()))

        answer = answer_on(raw)

        assert (answer.status, answer.code) == (400, "invalid_value")
        assert raw.recv(65536) == b"", "it is the only answer"


@pytest.mark.parametrize("rest", [b"zz\r\n", b"-1\r\n", b"5 5\r\n", b"2\r\nabc\r\n", b"1;\n\r\na"])
def test_h6_a_malformed_chunk_ends_the_connection(endpoint: Endpoint, rest: bytes) -> None:
    with endpoint.connect() as raw:
        data = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + rest + SMUGGLED
        raw.sendall(data.replace(b"%H", endpoint.netloc.encode()))

        assert answer_on(raw).status == 400
        assert raw.recv(65536) == b""


def test_h6_a_bare_line_feed_ends_no_head(endpoint: Endpoint) -> None:
    assert endpoint.send(b"GET /health HTTP/1.1\nHost: %H\n\n").status == 400


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "OPTIONS"])
def test_h6_a_body_where_none_belongs_is_refused(endpoint: Endpoint, method: str) -> None:
    assert endpoint.ask(method, "/v1/models", body=b"x").status == 400


def test_h6_requests_in_a_row_are_answered_each_on_its_own(endpoint: Endpoint) -> None:
    with endpoint.connect() as raw:
        last = SMUGGLED.replace(b"Host", b"Connection: close\r\nHost")
        raw.sendall((SMUGGLED * 2 + last).replace(b"%H", endpoint.netloc.encode()))

        received = b"".join(iter(lambda: raw.recv(65536), b""))

        assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"200"] * 3


@pytest.mark.parametrize(
    "lines",
    [
        [b"X-Long: " + b"a" * (17 << 10)],
        [b"X-Many: a"] * 200,
        [b"X-Many-%d: " % n + b"a" * 1000 for n in range(80)],
    ],
    ids=["long", "many", "both"],
)
def test_h6_a_head_of_more_than_16_kib_or_100_headers_is_refused(
    endpoint: Endpoint, lines: list[bytes]
) -> None:
    head = b"\r\n".join([b"GET /health HTTP/1.1", b"Host: %H", *lines, b"", b""])

    answer = endpoint.send(head)

    assert (answer.status, answer.code) == (431, "head_too_large")


def test_h6_a_head_that_does_not_end_is_refused_at_16_kib(endpoint: Endpoint) -> None:
    answer = endpoint.send(b"GET /health HTTP/1.1\r\nHost: %H\r\nX-Endless: " + b"a" * (17 << 10))

    assert (answer.status, answer.code) == (431, "head_too_large")


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def pour(endpoint: Endpoint, head: bytes, piece: bytes, times: int) -> int:
    """Send a body piece by piece until it is answered, and return the status."""
    with endpoint.connect() as raw:
        raw.settimeout(DEADLINE_S)
        raw.sendall(head.replace(b"%H", endpoint.netloc.encode()))
        with suppress(ConnectionError):
            for _ in range(times):
                raw.sendall(piece)
                if is_answered(raw):
                    break
        return answer_on(raw).status


def is_answered(raw: socket.socket) -> bool:
    raw.setblocking(False)
    try:
        return bool(raw.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        raw.settimeout(DEADLINE_S)
