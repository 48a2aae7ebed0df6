from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pals.net.codec import decode, decode_int8, encode, encode_int8
from pals.net.wire import (
    INT8_BLOCK,
    Codec,
    Frame,
    FrameShape,
    Lane,
    Outgoing,
    Row,
    Rows,
    buffer_of,
    hidden_shape,
)
from pals.types import ActivationDtype, SessionId

RAW = hidden_shape(b"m" * 32, 10, "bf16", 80)
INT8 = replace(RAW, codec=Codec.INT8)
TINIEST = 2.0**-112
"""Twice the greatest magnitude that a block may lose whole."""

values = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.sampled_from([1, 31, 32, 33, 64, 80])),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


def greatest_beside(array: np.ndarray) -> np.ndarray:
    """Return for each element the greatest magnitude of its block."""
    width = array.shape[1]
    starts = range(0, width, INT8_BLOCK)
    parts = [np.abs(array[:, s : s + INT8_BLOCK]) for s in starts]
    return np.concatenate(
        [np.broadcast_to(p.max(axis=1, keepdims=True), p.shape) for p in parts], axis=1
    )


@settings(deadline=None)
@given(values)
def test_an_element_is_off_by_at_most_half_a_scale(array: np.ndarray) -> None:
    back = decode_int8(encode_int8(array), array.shape[1])
    # bfloat16 rounds a scale up by less than one part in 128.
    bound = greatest_beside(array).astype(np.float64) / 254 * (1 + 2.0**-7) + TINIEST
    assert (np.abs(back.astype(np.float64) - array) <= bound).all()


def test_the_greatest_element_of_a_block_is_kept_and_zeros_are_zeros() -> None:
    array = np.zeros((1, 2 * INT8_BLOCK), np.float32)
    array[0, 3] = 127.0
    assert decode_int8(encode_int8(array), array.shape[1]).tolist() == array.tolist()


def test_an_outlier_costs_only_its_own_block() -> None:
    array = np.full((1, 2 * INT8_BLOCK), 1.0, np.float32)
    array[0, 0] = 1e6
    back = decode_int8(encode_int8(array), array.shape[1])
    assert np.abs(back[0, INT8_BLOCK:] - 1.0).max() < 0.01
    assert abs(back[0, 0] - 1e6) < 1e4


def test_the_bytes_are_the_documented_ones() -> None:
    array = np.zeros((1, INT8_BLOCK + 1), np.float32)
    array[0, :3] = 254.0, -254.0, 1.0
    array[0, -1] = 127.0 * 2.0**-3
    coded = encode_int8(array)
    scales = np.array([2.0, 2.0**-3], ml_dtypes.bfloat16).view(np.uint8)
    integers = np.zeros(INT8_BLOCK + 1, np.int8)
    integers[[0, 1, -1]] = 127, -127, 127
    assert coded.tobytes() == integers.tobytes() + scales.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_after_decoding(bad: float) -> None:
    array = np.ones((2, 2 * INT8_BLOCK), np.float32)
    array[1, 5] = bad
    back = decode_int8(encode_int8(array), array.shape[1])
    assert np.isnan(back[1, :INT8_BLOCK]).all()
    assert np.isfinite(back[0]).all()
    assert np.isfinite(back[1, INT8_BLOCK:]).all()


@pytest.mark.parametrize("smallest", [0.0, 1e-45, 1e-38, 2.0**-114])
def test_blocks_next_to_nothing_are_read_back_as_zeros(smallest: float) -> None:
    array = np.full((1, INT8_BLOCK), smallest, np.float32)
    assert not decode_int8(encode_int8(array), INT8_BLOCK).any()


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_greatest_numbers_of_the_dtype_do_not_overflow(dtype: ActivationDtype) -> None:
    kind = {"bf16": ml_dtypes.bfloat16, "f32": np.float32}[dtype]
    array = np.full((1, INT8_BLOCK), ml_dtypes.finfo(kind).max, kind).astype(np.float32)
    back = decode_int8(encode_int8(array), INT8_BLOCK)
    assert np.isfinite(back).all() or dtype == "f32"


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_frame_comes_back_in_its_own_dtype(dtype: ActivationDtype) -> None:
    raw = hidden_shape(b"m" * 32, 10, dtype, 80)
    coded_shape = replace(raw, codec=Codec.INT8)
    kind = {"bf16": ml_dtypes.bfloat16, "f32": np.float32}[dtype]
    states = np.random.default_rng(0).normal(size=(5, 80)).astype(kind)
    rows = Rows.of(Row(SessionId(b"a" * 16), 0, 2), Row(SessionId(b"b" * 16), 7, 3))
    outgoing = Outgoing(raw, rows, (buffer_of(states[:2]), buffer_of(states[2:])))

    coded = encode(outgoing, coded_shape)
    [payload] = coded.payload
    back = decode(Frame(Lane.PREFILL, coded.shape, coded.rows, memoryview(payload)))

    assert len(payload) == 5 * coded_shape.token_bytes == 5 * (80 + 3 * 2)
    assert (back.shape, back.rows) == (raw, rows)
    read = np.frombuffer(back.payload, kind).reshape(5, 80).astype(np.float32)
    error = np.abs(read - states.astype(np.float32))
    assert error.max() < 0.02
    assert error.mean() < 0.01


def test_raw_frames_are_left_alone() -> None:
    outgoing = Outgoing(RAW, Rows.of(Row(SessionId(b"a" * 16), 0, 1)), (bytes(160),))
    frame = Frame(Lane.PREFILL, RAW, outgoing.rows, memoryview(bytes(160)))
    assert encode(outgoing, RAW) is outgoing
    assert decode(frame) is frame


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=400))
def test_any_bytes_decode_to_what_their_rows_say(data: bytes) -> None:
    """The row table has been checked against the size; what the bytes say cannot change it."""
    shape: FrameShape = replace(INT8, width=40)
    tokens = -(-len(data) // shape.token_bytes)
    payload = memoryview(data.ljust(tokens * shape.token_bytes, b"\xff"))
    rows = Rows.of(Row(SessionId(b"a" * 16), 0, tokens))
    frame = decode(Frame(Lane.PREFILL, shape, rows, payload))
    assert len(frame.payload) == tokens * shape.raw_token_bytes
