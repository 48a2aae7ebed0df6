from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pals.errors import InvalidFrame
from pals.net.control import (
    MAX_ADDRESSES,
    MAX_CONTEXT,
    MAX_HISTORY_TOKENS,
    MAX_HOPS,
    MAX_LOGIT_BIAS,
    MAX_NAMES_BYTES,
    MAX_STOP_TOKENS,
    Ack,
    Close,
    Control,
    Failed,
    Fork,
    GrammarSpec,
    Hop,
    Open,
    Opened,
    Preempted,
    Refused,
    Sampler,
    Stats,
    StatsRequest,
    answer_of,
    decode_control,
    encode_control,
    history_of,
    session_of,
    split_names,
)
from pals.net.wire import MAX_CONTROL_BYTES
from pals.types import MAX_GRAMMAR_BYTES, Grammar, PeerId, Sampling

PEER = PeerId("peer-a")
SESSION = b"s" * 16
HOP = Hop(peer="peer-b", start=0, stop=2, addresses=("/ip4/127.0.0.1/tcp/1",))
SAMPLING = Sampling(
    temperature=0.5,
    top_k=40,
    top_p=0.9,
    min_p=0.05,
    repetition_penalty=1.1,
    presence_penalty=-0.5,
    frequency_penalty=0.5,
    logit_bias=((7, -100.0), (9, 0.5)),
    seed=2**64 - 1,
    logprobs=20,
)
SAMPLER = msgspec.structs.replace(Sampler.of(SAMPLING), history=b"\1\0\0\0\2\0\0\0", answered=1)
OPEN = Open(
    session=SESSION,
    chain=(HOP, Hop(peer="peer-c", start=2, stop=4)),
    prompt_tokens=5,
    max_new_tokens=7,
    stop_token_ids=(0, 2),
    names=b"n" * 32,
    replaces=b"r" * 16,
    deadline_s=9.5,
    sampler=SAMPLER,
)
STATS = Stats(steps=3, step_ms=1.5, queue_ms=0.1, handover_ms=0.3, codec_ms=0.2, turn_ms=9.0)
MESSAGES: list[Control] = [
    OPEN,
    Opened(session=SESSION, held=64),
    Preempted(session=SESSION),
    Fork(session=SESSION, child=b"c" * 16, position=4, sampler=SAMPLER),
    Refused(session=SESSION, code="PALS-X", problem="no"),
    Close(session=SESSION, names=b"n" * 16),
    Failed(session=SESSION, code="PALS-X", problem="lost"),
    Ack(session=SESSION, position=3),
    StatsRequest(),
    STATS,
]


def decode(data: bytes) -> Control:
    return decode_control(PEER, memoryview(data))


def refusal(data: bytes) -> str:
    with pytest.raises(InvalidFrame) as caught:
        decode(data)
    assert caught.value.fields["peer"] == PEER
    return str(caught.value.fields["problem"])


def encoded_open(**changes: Any) -> bytes:
    """Return an `Open` on the wire with fields that no `Open` can be made with."""
    return msgspec.msgpack.encode({**msgspec.to_builtins(OPEN, builtin_types=(bytes,)), **changes})


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_message_survives_the_wire(message: Control) -> None:
    assert decode(encode_control(message)) == message


def test_session_id_is_that_of_the_message() -> None:
    assert session_of(OPEN) == session_of(Close(session=SESSION)) == SESSION


def test_hand_made_open_is_taken() -> None:
    assert decode(encoded_open()) == OPEN


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("session", b"s" * 15),
        ("session", b"s" * 17),
        ("session", "s" * 16),
        ("chain", ()),
        ("chain", [msgspec.to_builtins(HOP)] * (MAX_HOPS + 1)),
        ("chain", [{"peer": "p" * 129, "start": 0, "stop": 2}]),
        ("chain", [{"peer": "p", "start": -1, "stop": 2}]),
        ("chain", [{"peer": "p", "start": 0, "stop": 65536}]),
        ("chain", [{"peer": "p", "start": 0, "stop": 2, "addresses": ["a"] * 17}]),
        ("chain", [{"peer": "p", "start": 0, "stop": 2, "addresses": ["a" * 513]}]),
        ("chain", [{"peer": "p", "start": 0, "stop": 2, "extra": 1}]),
        ("prompt_tokens", 0),
        ("prompt_tokens", MAX_CONTEXT + 1),
        ("prompt_tokens", 1.5),
        ("prompt_tokens", True),
        ("max_new_tokens", 0),
        ("max_new_tokens", -1),
        ("max_new_tokens", MAX_CONTEXT + 1),
        ("stop_token_ids", [0] * (MAX_STOP_TOKENS + 1)),
        ("stop_token_ids", ["0"]),
        ("names", b"n" * 15),
        ("names", b"n" * (MAX_NAMES_BYTES + 16)),
        ("replaces", b"r" * 15),
        ("replaces", b"r" * 17),
        ("deadline_s", -1.0),
        ("deadline_s", math.nan),
        ("deadline_s", math.inf),
        ("type", "Nothing"),
        ("type", 3),
        ("unknown", 1),
    ],
)
def test_open_with_a_value_out_of_range_is_refused(field: str, value: object) -> None:
    refusal(encoded_open(**{field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("chain", [msgspec.to_builtins(HOP)] * MAX_HOPS),
        ("chain", [{"peer": "p", "start": 0, "stop": 65535, "addresses": ["a"] * MAX_ADDRESSES}]),
        ("stop_token_ids", [0] * MAX_STOP_TOKENS),
        ("prompt_tokens", MAX_CONTEXT),
        ("names", b"n" * MAX_NAMES_BYTES),
        ("replaces", b""),
        ("sampler", None),
    ],
)
def test_open_with_a_value_at_its_limit_is_taken(field: str, value: object) -> None:
    assert isinstance(decode(encoded_open(**{field: value})), Open)


def encoded_sampler(field: str, value: object) -> bytes:
    """Return an `Open` on the wire whose sampler has a field that none can be made with."""
    sampler = msgspec.to_builtins(SAMPLER, builtin_types=(bytes,))
    return encoded_open(sampler={**sampler, field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.1),
        ("frequency_penalty", math.nan),
        ("logit_bias", [(-1, 0.0)]),
        ("logit_bias", [(7, 101.0)]),
        ("logit_bias", [(7, math.nan)]),
        ("logit_bias", [(7,)]),
        ("logit_bias", [(0, 0.0)] * (MAX_LOGIT_BIAS + 1)),
        ("seed", -1),
        ("logprobs", -1),
        ("logprobs", 21),
        ("grammar", {"kind": "lark", "source": "a" * (MAX_GRAMMAR_BYTES + 1)}),
        ("grammar", {"kind": "lark", "source": "é" * (MAX_GRAMMAR_BYTES // 2 + 1)}),
        ("grammar", {"kind": "regex", "source": "a"}),
        ("grammar", {"kind": "lark"}),
        ("grammar", {"kind": "lark", "source": "a", "more": 1}),
        ("history", b"123"),
        ("history", bytes(4 * MAX_HISTORY_TOKENS + 4)),
        ("answered", 3),
        ("unknown", 1),
    ],
)
def test_sampler_with_a_value_out_of_range_is_refused(field: str, value: object) -> None:
    refusal(encoded_sampler(field, value))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.0),
        ("top_p", 1.0),
        ("logit_bias", [(0, 100.0)] * MAX_LOGIT_BIAS),
        ("history", bytes(4 * MAX_HISTORY_TOKENS)),
        ("answered", 2),
        ("logprobs", None),
        ("grammar", {"kind": "json_schema", "source": "é" * (MAX_GRAMMAR_BYTES // 2)}),
        ("grammar", {"kind": "json_object", "source": ""}),
    ],
)
def test_sampler_with_a_value_at_its_limit_is_taken(field: str, value: object) -> None:
    assert isinstance(decode(encoded_sampler(field, value)), Open)


def test_sampler_says_all_of_a_sampling() -> None:
    assert Sampler.of(SAMPLING).to_sampling() == SAMPLING
    assert Sampler().to_sampling() == Sampling()


def test_names_and_ids_are_read_one_by_one() -> None:
    assert split_names(b"n" * 16 + b"m" * 16) == (b"n" * 16, b"m" * 16)
    assert split_names(b"") == ()
    assert history_of(SAMPLER).tolist() == [1, 2]
    assert answer_of(SAMPLER) == [2]
    assert answer_of(Sampler()) == []


def test_a_grammar_on_the_wire_is_a_grammar() -> None:
    grammar = Grammar(kind="json_schema", source='{"type": "object"}')
    assert GrammarSpec.of(grammar).to_grammar() == grammar


def test_the_largest_message_fits_a_frame() -> None:
    grammar = GrammarSpec(kind="lark", source="a" * MAX_GRAMMAR_BYTES)
    sampler = msgspec.structs.replace(
        SAMPLER,
        grammar=grammar,
        history=bytes(4 * MAX_HISTORY_TOKENS),
        logit_bias=((2**31 - 1, 0.1),) * MAX_LOGIT_BIAS,
    )
    opened = msgspec.structs.replace(OPEN, sampler=sampler, names=bytes(MAX_NAMES_BYTES))
    assert len(encode_control(opened)) <= MAX_CONTROL_BYTES


@pytest.mark.parametrize("field", ["step_ms", "queue_ms", "handover_ms", "codec_ms", "turn_ms"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.1, 1e10])
def test_stats_that_are_no_duration_are_refused(field: str, value: float) -> None:
    assert field in refusal(encode_control(msgspec.structs.replace(STATS, **{field: value})))


def test_stats_of_a_negative_count_are_refused() -> None:
    assert "steps" in refusal(encode_control(msgspec.structs.replace(STATS, steps=-1)))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\xc1", id="reserved byte"),
        pytest.param(b"\x80", id="no tag"),
        pytest.param(b"\x81\xa4type\xa1\xff", id="tag that is not UTF-8"),
        pytest.param(b"\x81\xa1\xff\x01", id="key that is not UTF-8"),
        pytest.param(b"\x91" * 100_000, id="deep nesting"),
        pytest.param(b"\x81\xa4type\xdd\xff\xff\xff\xff", id="array of 2^32 elements"),
        pytest.param(b"\x81\xa4type\xc6\xff\xff\xff\xff", id="binary of 2^32 bytes"),
        pytest.param(b"\x80\x04\x95\x0b\x00\x00\x00", id="pickle"),
        pytest.param(encode_control(StatsRequest()) + b"\0", id="trailing byte"),
        pytest.param(encode_control(OPEN)[:-1], id="truncated"),
    ],
)
def test_garbage_is_refused(data: bytes) -> None:
    refusal(data)


def test_refusal_repeats_little_of_a_hostile_message() -> None:
    tag = "\x1b[2J\n" * 20_000
    for data in (msgspec.msgpack.encode({"type": tag}), encoded_open(**{tag: 1})):
        problem = refusal(data)
        assert len(problem) < 1000
        assert problem.isprintable()


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_nothing_but_invalid_frame(data: bytes) -> None:
    refusal(data)


@given(st.sampled_from(MESSAGES), st.data())
def test_changed_message_raises_nothing_but_invalid_frame(
    message: Control, data: st.DataObject
) -> None:
    encoded = bytearray(encode_control(message))
    position = data.draw(st.integers(0, len(encoded) - 1))
    encoded[position] = data.draw(st.integers(0, 255))
    with suppress(InvalidFrame):
        assert isinstance(decode(bytes(encoded)), Control)
