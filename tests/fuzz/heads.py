"""The heads of HTTP requests: what passes must be read the same way by whoever reads it."""

from __future__ import annotations

import h11

from pals.api.heads import MAX_HEAD_BYTES, MAX_HEADERS, check_head
from pals.errors import HeadTooLarge, InvalidRequest

END = b"\r\n\r\n"
LENGTHS = (b"content-length", b"transfer-encoding")


def run_head(data: bytes) -> bool:
    """Check a head, and compare what the parser makes of it with its plain lines."""
    try:
        check_head(data)
    except (HeadTooLarge, InvalidRequest):
        return False
    head, end, _ = data.partition(END)
    if not end:
        return True
    connection = h11.Connection(h11.SERVER, MAX_HEAD_BYTES)
    connection.receive_data(data)
    try:
        request = connection.next_event()
    except h11.RemoteProtocolError:
        return False
    assert isinstance(request, h11.Request)
    first, *lines = head.split(b"\r\n")
    assert first == b" ".join([request.method, request.target, b"HTTP/" + request.http_version])
    assert len(lines) == len(request.headers) <= MAX_HEADERS
    for line, (name, value) in zip(lines, request.headers, strict=True):
        written, _, rest = line.partition(b":")
        assert written.lower() == name
        assert rest.strip(b" \t").lower() == value.lower()
    framing = [name for name, _ in request.headers if name in LENGTHS]
    assert len(framing) <= 1
    return True


def head_seeds() -> tuple[bytes, ...]:
    host = b"Host: localhost:8080\r\n"
    return (
        b"GET /v1/models?x=%20 HTTP/1.1\r\n" + host + b"\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\n"
        + host
        + b"Content-Length: 12\r\n\r\n"
        + b"{}" * 6,
        b"POST /v1/completions HTTP/1.1\r\n"
        + host
        + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"PUT / HTTP/1.0\r\nX-Text: \xfc:\t y \r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\n" + host + b"Origin: null\r\nAuthorization: Bearer x\r\n\r\n",
    )
