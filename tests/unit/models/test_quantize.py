"""Quantisation on the host: what the integers stand for, block by block."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.models.quantize import (
    GROUP_SIZES,
    MAX_CODE,
    dequantize_int4,
    dequantize_int8,
    pack_int4,
    quantize_int4,
    quantize_int8,
    rotate,
    rotation,
    unrotate,
)

SIZES = st.integers(1, 300)
DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


def matrix(rows: int, columns: int, *, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)
    return values.astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 9), columns=SIZES, seed=st.integers(0, 99))
def test_int8_is_within_half_a_step(dtype: type, rows: int, columns: int, seed: int):
    source = matrix(rows, columns, seed=seed, dtype=dtype)
    quantized = quantize_int8(source)
    turned = rotate(source.astype(np.float32))
    error = np.abs(dequantize_int8(quantized) - turned)
    assert (error <= quantized.scales[:, None] * 0.5001).all()
    np.testing.assert_allclose(quantized.scales, np.abs(turned).max(axis=1) / 127, rtol=1e-6)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 9), columns=SIZES, seed=st.integers(0, 99))
def test_int4_is_within_a_step_of_its_group(group_size: int, rows: int, columns: int, seed: int):
    source = matrix(rows, columns, seed=seed)
    quantized = quantize_int4(source, group_size)
    error = np.abs(dequantize_int4(quantized, columns) - source)
    steps = np.repeat(quantized.scales.T, group_size, axis=1)[:, :columns]
    assert (error <= steps * 1.0001).all()
    assert np.mean(error <= steps * 0.5001) > 0.8  # the ends of a group's range alone are worse


def test_a_partial_group_takes_its_range_from_its_own_columns():
    source = np.concatenate([matrix(3, 128), 100 + 0.1 * matrix(3, 5, seed=1)], axis=1)
    quantized = quantize_int4(source, 128)
    error = np.abs(dequantize_int4(quantized, 133) - source)
    assert error[:, 128:].max() < 100 / 112


def test_a_group_of_one_value_far_from_zero_is_kept_to_half_a_percent():
    for value in (7.0, -7.0):
        quantized = quantize_int4(np.full((2, 64), value, np.float32), 32)
        np.testing.assert_allclose(dequantize_int4(quantized, 64), value, rtol=0.005)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_groups_of_zeros_are_exact(dtype: type):
    source = np.zeros((4, 100), dtype)
    assert not dequantize_int8(quantize_int8(source)).any()
    assert not dequantize_int4(quantize_int4(source, 32), 100).any()


def test_values_below_float32s_normal_range_count_as_zero():
    source = np.full((2, 32), 1e-44, np.float32)
    assert not dequantize_int8(quantize_int8(source)).any()
    assert not dequantize_int4(quantize_int4(source, 32), 32).any()


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(2, 40), columns=SIZES, cut=st.integers(1, 39))
def test_blocks_of_rows_are_the_matrix(rows: int, columns: int, cut: int):
    source = matrix(rows, columns)
    parts = [part for part in np.split(source, [min(cut, rows)]) if len(part)]
    eight = zip(*map(quantize_int8, parts), strict=True)
    four = zip(*(quantize_int4(part, 64) for part in parts), strict=True)
    for got, wanted in zip(eight, quantize_int8(source), strict=True):
        np.testing.assert_array_equal(np.concatenate(got), wanted)
    for got, wanted in zip(four, quantize_int4(source, 64), strict=True):
        np.testing.assert_array_equal(np.concatenate(got, axis=1), wanted)


def test_rows_of_many_blocks_are_all_written():
    source = matrix(3000, 256)  # three blocks of the quantiser
    error = dequantize_int8(quantize_int8(source)) - rotate(source)
    assert np.abs(error).max() < 0.02
    assert np.abs(dequantize_int4(quantize_int4(source, 32), 256) - source).max() < 0.5


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_not_finite_are_refused(bad: float, dtype: type):
    source = matrix(3, 40, dtype=dtype)
    source[1, 39] = bad
    with pytest.raises(ValueError, match="infinities or NaN"):
        quantize_int8(source)
    with pytest.raises(ValueError, match="infinities or NaN"):
        quantize_int4(source, 32)


@settings(max_examples=30, deadline=None)
@given(columns=SIZES, group_size=st.sampled_from(GROUP_SIZES), seed=st.integers(0, 99))
def test_codes_that_exist_already_are_kept_to_the_bit(columns: int, group_size: int, seed: int):
    random = np.random.default_rng(seed)
    groups = -(-columns // group_size)
    codes = random.integers(0, MAX_CODE + 1, (6, columns), np.uint8)
    zeros = random.integers(0, MAX_CODE + 2, (6, groups), np.int16)
    scales = random.random((6, groups), np.float32).astype(np.float16)
    packed = pack_int4(codes, scales, zeros, group_size)
    group_of = np.arange(columns) // group_size
    steps = codes.astype(np.float32) - zeros[:, group_of]
    wanted = steps * scales.astype(np.float32)[:, group_of]
    np.testing.assert_array_equal(dequantize_int4(packed, columns), wanted)


@pytest.mark.parametrize("size", [1, 7, 48, 576, 4096])
def test_the_rotation_is_orthogonal_and_undone(size: int):
    source = matrix(4, size)
    other = matrix(4, size, seed=1)
    np.testing.assert_allclose(rotate(source) @ rotate(other).T, source @ other.T, atol=2e-3)
    np.testing.assert_allclose(unrotate(rotate(source)), source, atol=1e-5)
    _, hadamard = rotation(size)
    np.testing.assert_allclose(hadamard @ hadamard, np.eye(len(hadamard)), atol=1e-5)
