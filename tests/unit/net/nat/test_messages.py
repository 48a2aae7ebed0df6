from __future__ import annotations

from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.errors import InvalidFrame
from pals.net.nat.messages import (
    LENGTH,
    MAX_MESSAGE_BYTES,
    Ask,
    Go,
    Here,
    Meet,
    Met,
    Offer,
    Refused,
    Relay,
    Relayed,
    Seen,
    Taken,
    decode_message,
    encode_message,
)
from pals.types import PeerId

PEER = PeerId("A")
ADDRESS = "/ip4/203.0.113.7/tcp/4001"
MESSAGES = (
    Ask(ports=(4001, 1)),
    Seen(observed=ADDRESS, reached=(4001,)),
    Meet(target="B"),
    Here(observed=(ADDRESS,), relays=True),
    Offer(addresses=(ADDRESS, ADDRESS)),
    Met(source="B", observed=(ADDRESS,), addresses=()),
    Go(),
    Relay(target="B"),
    Relayed(source="B"),
    Taken(),
    Refused(problem="no"),
)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_is_read_as_it_was_written(message):
    data = encode_message(message)

    assert LENGTH.unpack(data[:2]) == (len(data) - 2,)
    assert decode_message(PEER, data[2:]) == message


@pytest.mark.parametrize(
    "body",
    [
        ["ask", [0]],
        ["ask", [65536]],
        ["ask", [1, 2, 3, 4]],
        ["ask", [1], "more"],
        ["seen", "no address", []],
        ["seen", ADDRESS + " ", []],
        ["offer", [ADDRESS] * 5],
        ["offer", ["/" * 101]],
        ["meet", ""],
        ["meet", "B" * 129],
        ["refused", "x" * 201],
        ["unheard of"],
        {"kind": "go"},
        None,
    ],
    ids=repr,
)
def test_what_breaks_a_limit_or_is_no_message_is_refused(body):
    with pytest.raises(InvalidFrame):
        decode_message(PEER, msgspec.msgpack.encode(body))


def test_a_message_that_is_too_long_is_refused_before_it_is_read():
    with pytest.raises(InvalidFrame, match="1025 bytes"):
        decode_message(PEER, bytes(MAX_MESSAGE_BYTES + 1))


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data):
    with suppress(InvalidFrame):
        decode_message(PEER, data)
