"""Products with quantised matrices, against NumPy and each other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pals.models import quantized
from pals.models.quantize import (
    GROUP_SIZES,
    Int4Matrix,
    Int8Matrix,
    dequantize_int4,
    dequantize_int8,
    quantize_int4,
    quantize_int8,
    rotate,
)
from pals.models.quantized import (
    FEW_ROWS,
    FEWEST_ROWS,
    matmul_int4,
    matmul_int8,
    split_planes,
)

OUT = 24
MANY = FEW_ROWS + 7
PLATFORMS = ("cpu", "gpu")
PROCESSORS = ("tiles", "none")


def draw(rows: int, columns: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)


def relative_error(got: jax.Array, wanted: np.ndarray) -> float:
    return float(np.abs(np.asarray(got) - wanted).max() / np.abs(wanted).max())


@settings(max_examples=20, deadline=None)
@given(columns=st.integers(1, 300), seed=st.integers(0, 99))
def test_int8_means_the_same_on_the_device_to_the_bit(columns: int, seed: int):
    matrix = quantize_int8(draw(OUT, columns, seed=seed))
    got = jax.jit(quantized.dequantize_int8)(*matrix)
    np.testing.assert_array_equal(np.asarray(got), dequantize_int8(matrix))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@settings(max_examples=10, deadline=None)
@given(columns=st.integers(1, 300), seed=st.integers(0, 99))
def test_int4_means_the_same_on_the_device_to_the_bit(group_size: int, columns: int, seed: int):
    matrix = quantize_int4(draw(OUT, columns, seed=seed), group_size)
    widen = jax.jit(quantized.dequantize_int4, static_argnames="in_size")
    got = widen(*matrix, in_size=columns)
    np.testing.assert_array_equal(np.asarray(got), dequantize_int4(matrix, columns))


def wanted_int8(x: np.ndarray, matrix: Int8Matrix) -> np.ndarray:
    return rotate(x).astype(np.float64) @ dequantize_int8(matrix).astype(np.float64).T


def wanted_int4(x: np.ndarray, matrix: Int4Matrix) -> np.ndarray:
    return x.astype(np.float64) @ dequantize_int4(matrix, x.shape[1]).astype(np.float64).T


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("rows", [1, FEWEST_ROWS, FEWEST_ROWS + 1, FEW_ROWS, MANY])
@pytest.mark.parametrize("columns", [5, 64, 576])
def test_rows_that_are_not_rounded_are_finer_than_bf16_on_every_processor(
    monkeypatch, rows: int, columns: int, processor: str
):
    monkeypatch.setattr(quantized, "bf16_products", lambda: processor)
    x, matrix = draw(rows, columns), quantize_int8(draw(OUT, columns, seed=1))
    got = matmul_int8(jnp.asarray(x), *matrix, platform="cpu", quantize_activations=False)
    assert relative_error(got, wanted_int8(x, matrix)) < 2e-4


@pytest.mark.parametrize(
    ("rows", "processor", "sums_are_fast", "way"),
    [
        (FEWEST_ROWS, "tiles", True, "matrix first"),
        (FEW_ROWS, "tiles", True, "matrix first"),
        (FEWEST_ROWS, "none", True, "rows first"),
        (FEWEST_ROWS + 1, "none", True, "sum"),
        (FEW_ROWS, "none", True, "sum"),
        (FEWEST_ROWS, "none", False, "rows first"),
        (FEWEST_ROWS + 1, "none", False, "matrix first"),
        (MANY, "none", True, "matrix first"),
        (3 * FEW_ROWS, "none", True, "rows first"),
        (3 * FEW_ROWS, "tiles", True, "rows first"),
    ],
)
def test_each_processor_multiplies_int8_as_it_is_fastest(
    monkeypatch, rows: int, processor: str, sums_are_fast: bool, way: str
):
    monkeypatch.setattr(quantized, "bf16_products", lambda: processor)
    monkeypatch.setattr(quantized, "SUMS_ARE_FAST", sums_are_fast)

    assert way_of(rows) == way


def way_of(rows: int) -> str:
    """Return how a product of int8 is lowered."""
    x, matrix = jnp.ones((rows, 32)), quantize_int8(draw(OUT, 32))
    product = jax.jit(lambda x: matmul_int8(x, *matrix, platform="cpu"))
    text = product.lower(x).as_text()
    if "stablehlo.case" in text:
        return "sum"
    integers = next(line for line in text.splitlines() if "dot_general" in line and "xi8>" in line)
    return "matrix first" if f"(tensor<{OUT}x32x" in integers else "rows first"


def test_few_rows_are_not_rounded_to_int8_and_many_are():
    matrix = quantize_int8(draw(OUT, 256, seed=1))
    few, many = draw(FEW_ROWS, 256), draw(MANY, 256)
    kept = matmul_int8(jnp.asarray(few), *matrix, platform="cpu")
    rounded = matmul_int8(jnp.asarray(many), *matrix, platform="cpu")
    assert relative_error(kept, wanted_int8(few, matrix)) < 2e-4
    assert 5e-4 < relative_error(rounded, wanted_int8(many, matrix)) < 2e-2


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("columns", [5, 128, 576, 1100])
@pytest.mark.parametrize("rows", [1, 3, MANY])
def test_int4_rows_are_never_rounded_to_int8(group_size: int, columns: int, rows: int):
    x, matrix = draw(rows, columns), quantize_int4(draw(OUT, columns, seed=1), group_size)
    got = matmul_int4(jnp.asarray(x), *matrix, platform="cpu")
    assert relative_error(got, wanted_int4(x, matrix)) < 2e-4


@pytest.mark.parametrize("rows", [1, MANY])
def test_other_platforms_widen_the_matrix(rows: int):
    x = draw(rows, 100)
    eight, four = quantize_int8(draw(OUT, 100, seed=1)), quantize_int4(draw(OUT, 100, seed=1), 32)
    got8 = matmul_int8(jnp.asarray(x), *eight, platform="gpu")
    got4 = matmul_int4(jnp.asarray(x), *four, platform="gpu")
    assert relative_error(got8, wanted_int8(x, eight)) < 1e-5
    assert relative_error(got4, wanted_int4(x, four)) < 1e-5


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("rows", [1, MANY])
def test_products_are_float32_for_every_dtype(dtype: jnp.dtype, platform: str, rows: int):
    x = draw(rows, 100).astype(dtype)
    eight, four = quantize_int8(draw(OUT, 100)), quantize_int4(draw(OUT, 100), 32)
    for got in (
        matmul_int8(x, *eight, platform=platform),
        matmul_int4(x, *four, platform=platform),
    ):
        assert got.dtype == jnp.float32
        assert got.shape == (rows, OUT)


@pytest.mark.parametrize("quantize_activations", [True, False])
@pytest.mark.parametrize(
    "sizes", [(1, FEWEST_ROWS), (FEWEST_ROWS + 1, FEW_ROWS), (FEW_ROWS + 1, 64)]
)
def test_a_rows_result_does_not_depend_on_the_rows_beside_it(
    sizes: tuple[int, int], quantize_activations: bool
):
    fewer, more = sizes
    x = draw(more, 576).astype(jnp.bfloat16)
    eight, four = quantize_int8(draw(OUT, 576, seed=1)), quantize_int4(draw(OUT, 576, seed=1), 64)

    @jax.jit
    def products(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        options = {"platform": "cpu", "quantize_activations": quantize_activations}
        return matmul_int8(x, *eight, **options), matmul_int4(x, *four, platform="cpu")

    for part, whole in zip(products(x[:fewer]), products(x), strict=True):
        scale = np.abs(np.asarray(whole)).max()
        np.testing.assert_allclose(part, whole[:fewer], rtol=0, atol=1e-6 * scale)


def test_planes_of_zeros_and_of_outliers_are_exact_where_they_can_be():
    rows = jnp.asarray([[0.0, 0.0, 0.0], [127.0, 1.0, -64.0]])
    planes = split_planes(rows, count=2)
    assert planes.low is not None
    np.testing.assert_array_equal(planes.high, [[0, 0, 0], [127, 1, -64]])
    np.testing.assert_array_equal(planes.low, np.zeros((2, 3)))


def test_the_longest_sum_fits_its_integer():
    columns = 1 << 17
    x = np.full((1, columns), 3.0, np.float32)
    rows = split_planes(jnp.asarray(x), count=2)
    product = quantized.multiply_planes(rows, jnp.full((2, columns), 127, jnp.int8))
    np.testing.assert_allclose(product, 3.0 * 127 * columns, rtol=1e-6)


def temporary_bytes(rows: int, out_size: int, columns: int, group_size: int) -> int:
    matrix = quantize_int4(np.zeros((out_size, columns), np.float32), group_size)
    x = jnp.zeros((rows, columns), jnp.bfloat16)
    run = jax.jit(matmul_int4, static_argnames="platform")
    compiled = run.lower(x, *matrix, platform="cpu").compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("rows", [1, 64])
def test_int4_needs_no_memory_for_a_widened_matrix(rows: int):
    short = temporary_bytes(rows, 1024, 1024, 64)
    long = temporary_bytes(rows, 1024, 4096, 64)
    assert long - short < 1024 * 3072 // 2  # less than half a byte for each further weight
