from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from litestar.types import HTTPReceiveMessage, Receive

from pals.api.gate.body import MAX_BODY_BYTES, check_json_depth, read_body, replaying
from pals.errors import BodyTooLarge, InvalidRequest, ReceiveTimeout


def arriving(*pieces: bytes, more: bool = False, gone: bool = False) -> Receive:
    """Return a receive that gives pieces of a body, and then nothing for ever or the end."""
    messages: list[HTTPReceiveMessage] = [
        {"type": "http.request", "body": piece, "more_body": more or index + 1 < len(pieces)}
        for index, piece in enumerate(pieces)
    ]
    if gone:
        messages.append({"type": "http.disconnect"})

    async def receive() -> HTTPReceiveMessage:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop(0)

    return receive


def test_a_body_is_joined_from_its_pieces() -> None:
    assert asyncio.run(read_body(arriving(b"a", b"", b"bc"))) == b"abc"


def test_a_body_may_be_as_long_as_the_limit_and_no_longer() -> None:
    assert asyncio.run(read_body(arriving(b"ab", b"cd"), limit_bytes=4)) == b"abcd"
    with pytest.raises(BodyTooLarge):
        asyncio.run(read_body(arriving(b"ab", b"cde", more=True), limit_bytes=4))


def test_a_body_that_does_not_end_in_time_is_given_up() -> None:
    with pytest.raises(ReceiveTimeout):
        asyncio.run(read_body(arriving(b"a", more=True), deadline_s=0.01))


def test_a_client_that_goes_away_ends_the_reading() -> None:
    with pytest.raises(InvalidRequest):
        asyncio.run(read_body(arriving(b"a", more=True, gone=True)))


def test_what_was_read_is_given_once_and_then_what_comes() -> None:
    async def received() -> Sequence[HTTPReceiveMessage]:
        receive = replaying(b"body", arriving(gone=True))
        return [await receive(), await receive()]  # pyright: ignore[reportReturnType]

    first, second = asyncio.run(received())
    assert first == {"type": "http.request", "body": b"body", "more_body": False}
    assert second == {"type": "http.disconnect"}


def nested(depth: int) -> bytes:
    return b'{"a":[' * (depth // 2) + b"]}" * (depth // 2)


def test_depth_is_allowed_up_to_the_limit() -> None:
    check_json_depth(nested(64))
    with pytest.raises(InvalidRequest):
        check_json_depth(nested(66))


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 100_000, b"[" * 65 + b"]" * 65])
def test_deep_or_unbalanced_nesting_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        check_json_depth(body)


@given(st.text(alphabet='[]{}"\\ab\n'))
def test_brackets_inside_strings_do_not_count(text: str) -> None:
    check_json_depth(msgspec.json.encode({"a": [text, {"b": text}]}))


@pytest.mark.timeout(10)  # hours, if it were not
@pytest.mark.parametrize("unit", [b'\\"', b'"', b"\\", b'"\\', b"[]", b'"[', b"a"])
def test_the_depth_check_is_linear(unit: bytes) -> None:
    body = unit * (MAX_BODY_BYTES // len(unit))

    with contextlib.suppress(InvalidRequest):
        check_json_depth(b'"' + body)
