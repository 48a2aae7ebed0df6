from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.api.heads import MAX_HEAD_BYTES, MAX_HEADERS, check_head
from pals.errors import HeadTooLarge, InvalidRequest

HOST = b"Host: localhost:8080\r\n"


def head(*lines: bytes, first: bytes = b"POST /v1/x HTTP/1.1") -> bytes:
    return b"\r\n".join([first, b"Host: localhost:8080", *lines, b"", b""])


@pytest.mark.parametrize(
    "received",
    [
        head(),
        head(b"Content-Length: 5") + b"a\nb\r\x00",
        head(b"Transfer-Encoding: Chunked"),
        head(first=b"GET / HTTP/1.0"),
        head(first=b"OPTIONS * HTTP/1.1"),
        head(b"X-Text: \xfc\xe9"),
    ],
)
def test_an_ordinary_head_passes_whatever_follows_it(received: bytes) -> None:
    check_head(received)


@given(st.integers(0, len(head(b"Content-Length: 5"))))
def test_every_beginning_of_a_head_may_still_become_one(length: int) -> None:
    check_head(head(b"Content-Length: 5")[:length])


AMBIGUOUS = pytest.mark.parametrize(
    "received",
    [
        b"GET / HTTP/1.1\nHost: a\n\n",
        b"GET / HTTP/1.1\r\nHost: a\n\r\n\r\n",
        head(b"X: a\rb"),
        head(b"X: a\x00b"),
        head(b"X: a", b" folded"),
        head(b"X: a", b"\tfolded"),
        head(b"Content-Length: 5", b"Content-Length: 5"),
        head(b"Content-Length: 5", b"Content-Length: 6"),
        head(b"Content-Length: 5, 5"),
        head(b"Content-Length: +5"),
        head(b"Content-Length: 0x5"),
        head(b"Content-Length: "),
        head(b"Content-Length: 5", b"Transfer-Encoding: chunked"),
        head(b"Transfer-Encoding: chunked", b"content-length : 5"),
        head(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"),
        head(b"Transfer-Encoding: gzip, chunked"),
        head(b"Transfer-Encoding: identity"),
        head(b"Transfer-Encoding: xchunked"),
        head(b"Transfer-Encoding: chunked", first=b"POST / HTTP/1.0"),
        head(first=b"GET http://localhost:8080/health HTTP/1.1"),
        head(first=b"CONNECT localhost:80 HTTP/1.1"),
        head(first=b"GET / HTTP/2.0"),
        head(first=b"GET / HTTP/1.2"),
        head(first=b"GET  / HTTP/1.1"),
        head(first=b"GET /"),
        head(first=b""),
        b"\r\n" + head(),
    ],
)


def check_in_parts(received: bytes, size: int) -> int:
    checked = 0
    for end in range(size, len(received) + size, size):
        checked = check_head(received[:end], checked)
    return checked


@AMBIGUOUS
def test_a_head_that_can_be_read_in_two_ways_is_refused(received: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_head(received)

    assert caught.value.http_status == 400


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@AMBIGUOUS
def test_it_is_refused_also_where_it_arrives_in_parts(received: bytes, size: int) -> None:
    with pytest.raises(InvalidRequest):
        check_in_parts(received, size)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_an_ordinary_head_passes_in_parts_and_leaves_nothing_checked(size: int) -> None:
    assert check_in_parts(head(b"X: a\tb", b"Content-Length: 5"), size) == 0


def test_what_was_checked_is_not_looked_at_again() -> None:
    beginning = b"GET / HTTP/1.1\r\nX: a\r"
    checked = check_head(beginning)

    # Everything but the CR, of which it is not known yet what follows it.
    assert checked == len(beginning) - 1
    assert check_head(b"\n" * checked + b"\r\nX", checked) == checked + 3


def test_a_head_of_any_size_over_the_limit_is_refused_whole_or_not() -> None:
    longest = MAX_HEAD_BYTES - len(head(b"X: "))
    check_head(head(b"X: " + b"a" * longest))
    for received in (head(b"X: " + b"a" * (longest + 1)), b"a" * (MAX_HEAD_BYTES + 1)):
        with pytest.raises(HeadTooLarge):
            check_head(received)


def test_too_many_headers_are_refused() -> None:
    check_head(head(*[b"X: a"] * (MAX_HEADERS - 1)))
    with pytest.raises(HeadTooLarge):
        check_head(head(*[b"X: a"] * MAX_HEADERS))
