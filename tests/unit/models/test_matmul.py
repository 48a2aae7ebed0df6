from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pals.models import matmul
from pals.models.matmul import FEW_ROWS, SUMMED_ROWS, WIDENED_BYTES, matmul_transposed

MATRIX_FIRST = "dot(matrix, rows)"
ROWS_FIRST = "dot(rows, matrix)"
SUM = "sum"
WIDENED = "float32, a part at a time"

if TYPE_CHECKING:
    from jax.stages import Wrapped

PROCESSORS = ("tiles", "vectors", "none", "unknown")


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def compiled() -> Wrapped:
    """Return the product as a program of its own, which no earlier trace stands for."""
    return jax.jit(lambda x, matrix: matmul_transposed(x, matrix))


def way_of(rows: int, dtype: str) -> str:
    """Return how a product is lowered."""
    x, matrix = jnp.ones((rows, 32), dtype), jnp.ones((48, 32), dtype)
    text = compiled().lower(x, matrix).as_text()
    if "stablehlo.while" in text:
        return WIDENED
    if "stablehlo.reduce" in text:
        return SUM
    product = next(line for line in text.splitlines() if "dot_general" in line)
    return MATRIX_FIRST if "(tensor<48x32x" in product else ROWS_FIRST


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("rows", [1, 2, SUMMED_ROWS, SUMMED_ROWS + 1, FEW_ROWS + 1])
def test_products_are_the_same_on_every_processor(monkeypatch, rows: int, processor: str) -> None:
    monkeypatch.setattr(matmul, "bf16_products", lambda: processor)
    x, matrix = draw(rows, 32), draw(48, 32, seed=1)

    product = compiled()(x, matrix)

    expected = np.asarray(x, np.float32) @ np.asarray(matrix, np.float32).T
    np.testing.assert_allclose(product, expected, atol=1e-4)


@pytest.mark.parametrize("part_bytes", [4 * 32, 4 * 32 * 7, 4 * 32 * 48, WIDENED_BYTES])
def test_matrix_is_widened_in_parts_of_which_the_last_may_be_partial(
    monkeypatch, part_bytes: int
) -> None:
    monkeypatch.setattr(matmul, "bf16_products", lambda: "none")
    monkeypatch.setattr(matmul, "WIDENED_BYTES", part_bytes)
    x, matrix = draw(SUMMED_ROWS + 1, 32), draw(48, 32, seed=1)

    product = compiled()(x, matrix)

    expected = np.asarray(x, np.float32) @ np.asarray(matrix, np.float32).T
    np.testing.assert_allclose(product, expected, atol=1e-4)


def test_rows_that_are_not_finite_spoil_no_others(monkeypatch) -> None:
    monkeypatch.setattr(matmul, "bf16_products", lambda: "none")
    monkeypatch.setattr(matmul, "SUMS_ARE_FAST", True)
    x, matrix = draw(2, 32).at[0].set(jnp.inf), draw(48, 32, seed=1)

    product = matmul_transposed(x, matrix)

    expected = np.asarray(x[1], np.float32) @ np.asarray(matrix, np.float32).T
    np.testing.assert_allclose(product[1], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "dtype", "processor", "way"),
    [
        (1, "bfloat16", "tiles", MATRIX_FIRST),
        (FEW_ROWS, "bfloat16", "tiles", MATRIX_FIRST),
        (FEW_ROWS + 1, "bfloat16", "tiles", ROWS_FIRST),
        (2, "bfloat16", "vectors", ROWS_FIRST),
        (2, "bfloat16", "unknown", ROWS_FIRST),
        (SUMMED_ROWS + 1, "bfloat16", "none", WIDENED),
        (2, "float32", "tiles", ROWS_FIRST),
        (2, "float32", "none", ROWS_FIRST),
    ],
)
def test_each_processor_multiplies_as_it_is_fastest(
    monkeypatch, rows: int, dtype: str, processor: str, way: str
) -> None:
    monkeypatch.setattr(matmul, "bf16_products", lambda: processor)

    assert way_of(rows, dtype) == way


@pytest.mark.parametrize(
    ("rows", "are_fast", "way"),
    [
        (1, True, SUM),
        (1, False, SUM),
        (2, True, SUM),
        (2, False, MATRIX_FIRST),
        (SUMMED_ROWS, True, SUM),
        (SUMMED_ROWS, False, MATRIX_FIRST),
    ],
)
def test_few_rows_are_summed_where_the_version_of_jax_is_fast_at_it(
    monkeypatch, rows: int, are_fast: bool, way: str
) -> None:
    monkeypatch.setattr(matmul, "bf16_products", lambda: "none")
    monkeypatch.setattr(matmul, "SUMS_ARE_FAST", are_fast)

    assert way_of(rows, "bfloat16") == way
    x, matrix = draw(rows, 32), draw(48, 32, seed=1)
    expected = np.asarray(x, np.float32) @ np.asarray(matrix, np.float32).T
    np.testing.assert_allclose(compiled()(x, matrix), expected, atol=1e-4)
