"""What the head of an HTTP/1 request may look like, so that nobody reads it differently.

The parser behind it is generous: it takes a bare LF for the end of a line, joins folded
lines, prefers one of two lengths. A proxy in front that decides otherwise would let one
request be smuggled inside another.

Source: RFC 9112, sections 2.2, 5.2 and 6.3, all of whose "MAY reject" are done here.
"""

from __future__ import annotations

import re

from pals.errors import HeadTooLarge, InvalidRequest

MAX_HEAD_BYTES = 16 << 10
MAX_HEADERS = 100

# A CR at the very end may be the first half of a line's end.
_BARE_LINE_END = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_REQUEST_LINE = re.compile(rb"[!-~]+ (/[!-~]*|\*) HTTP/1\.([01])")
_LENGTH = re.compile(rb"\d{1,18}")
_END = b"\r\n\r\n"


def check_head(received: bytes, checked: int = 0) -> int:
    """Check the head of a request, or as much of one as there is.

    Args:
        received: What has arrived since the request before; also what follows the head.
        checked: What this returned when there was less of the same head.

    Returns:
        How many bytes need not be looked at again, however small the parts are that the
        rest arrives in; 0 once the head is whole.

    Raises:
        HeadTooLarge: It has more than `MAX_HEAD_BYTES` or `MAX_HEADERS`.
        InvalidRequest: It can be read in more than one way.
    """
    end = received.find(_END, max(0, checked - len(_END) + 1))
    head = received if end < 0 else received[: end + len(_END)]
    if len(head) > MAX_HEAD_BYTES:
        raise HeadTooLarge(limit_bytes=MAX_HEAD_BYTES, limit_headers=MAX_HEADERS)
    if _BARE_LINE_END.search(head, checked) or _CONTROL.search(head, checked):
        raise InvalidRequest(problem="a line of the head has a control character")
    if end < 0:
        return len(head) - head.endswith(b"\r")
    request_line, *fields = head[: -len(_END)].split(b"\r\n")
    _check_fields(_minor_version(request_line), fields)
    return 0


def _minor_version(request_line: bytes) -> int:
    match = _REQUEST_LINE.fullmatch(request_line)
    if match is None:
        raise InvalidRequest(problem="the request line is no method, path and HTTP/1.0 or 1.1")
    return int(match[2])


def _check_fields(minor_version: int, fields: list[bytes]) -> None:
    if len(fields) > MAX_HEADERS:
        raise HeadTooLarge(limit_bytes=MAX_HEAD_BYTES, limit_headers=MAX_HEADERS)
    if any(field[:1] in (b" ", b"\t") for field in fields):
        raise InvalidRequest(problem="a header goes on in a second line")
    lengths = _values(fields, b"content-length")
    encodings = _values(fields, b"transfer-encoding")
    if len(lengths) + len(encodings) > 1:
        raise InvalidRequest(problem="more than one header says how long the body is")
    if lengths and not _LENGTH.fullmatch(lengths[0]):
        raise InvalidRequest(problem="Content-Length is no number")
    if encodings and (encodings[0].lower() != b"chunked" or minor_version == 0):
        raise InvalidRequest(problem="Transfer-Encoding can only be `chunked`, of HTTP/1.1")


def _values(fields: list[bytes], name: bytes) -> list[bytes]:
    split = (field.partition(b":") for field in fields)
    return [value.strip(b" \t") for key, _, value in split if key.strip(b" \t").lower() == name]
