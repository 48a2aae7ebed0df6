"""Few rows by matrices that are read where they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pals.models import in_place
from pals.models.in_place import MOST_PARTS, MOST_ROWS, WIDTH, multiply_in_place, reads_in_place

if TYPE_CHECKING:
    from numpy.typing import NDArray

DTYPES = ("bfloat16", "int8")


def draw(*shape: int, dtype: str = "float32", seed: int = 0) -> jax.Array:
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(40 * values if dtype == "int8" else values, dtype)


def product_of(x: jax.Array, matrix: jax.Array) -> NDArray[np.float64]:
    return np.asarray(x, np.float64) @ np.asarray(matrix, np.float64).T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", range(1, MOST_ROWS + 1))
@pytest.mark.parametrize("parts", [1, 4, 9, MOST_PARTS])
def test_a_product_is_the_one_in_float64(dtype: str, rows: int, parts: int) -> None:
    x = draw(rows, 2 * parts * WIDTH)
    matrix = draw(48, 2 * parts * WIDTH, dtype=dtype, seed=1)

    product = jax.jit(multiply_in_place)(x, matrix)

    assert product.dtype == jnp.float32
    expected = product_of(x, matrix)
    np.testing.assert_allclose(product, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows_at_a_time", [1, 7, 16, 47])
def test_a_matrix_is_read_in_blocks_of_which_the_last_may_be_partial(
    monkeypatch, dtype: str, rows_at_a_time: int
) -> None:
    monkeypatch.setattr(in_place, "BLOCK_BYTES", 4 * WIDTH * rows_at_a_time)
    x, matrix = draw(1, 4 * WIDTH), draw(48, 4 * WIDTH, dtype=dtype, seed=1)

    product = jax.jit(lambda x, matrix: multiply_in_place(x, matrix))(x, matrix)

    expected = product_of(x, matrix)
    np.testing.assert_allclose(product, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", range(3))
def test_one_matrix_of_a_stack_is_read(monkeypatch, dtype: str, number: int) -> None:
    monkeypatch.setattr(in_place, "BLOCK_BYTES", 4 * WIDTH * 11)
    x, stack = draw(1, 4 * WIDTH), draw(3, 48, 4 * WIDTH, dtype=dtype, seed=1)

    product = jax.jit(lambda x, stack, n: multiply_in_place(x, stack, n))(x, stack, number)

    expected = product_of(x, stack[number])
    np.testing.assert_allclose(product, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_finite_spoils_no_other(dtype: str, value: float) -> None:
    x, matrix = draw(2, 4 * WIDTH).at[0].set(value), draw(48, 4 * WIDTH, dtype=dtype, seed=1)

    product = jax.jit(multiply_in_place)(x, matrix)

    assert not np.isfinite(product[0]).any()
    expected = product_of(x[1:], matrix)
    np.testing.assert_allclose(product[1:], expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", range(1, MOST_ROWS + 1))
@pytest.mark.parametrize("parts", range(in_place.FEWEST_PARTS, MOST_PARTS + 1))
def test_nothing_is_copied_but_a_block_of_sums(dtype: str, rows: int, parts: int) -> None:
    """XLA writes out a whole stack without a branch, and on jax 0.12 with more parts."""
    in_size = parts * WIDTH * (1024 // parts)
    x = jax.ShapeDtypeStruct((rows, in_size), jnp.float32)
    stack = jax.ShapeDtypeStruct((3, 1024, in_size), dtype)

    compiled = jax.jit(multiply_in_place).lower(x, stack, 0).compile()

    assert compiled.memory_analysis().temp_size_in_bytes < 2 * in_place.BLOCK_BYTES
    assert 1024 * in_size > 4 * in_place.BLOCK_BYTES


@pytest.mark.parametrize(
    ("in_size", "parts"),
    [(16, 0), (33, 0), (32, 1), (128, 4), (576, 9), (544, 1), (1024, 8), (1536, 12), (14336, 14)],
)
def test_columns_are_added_up_in_as_many_parts_as_there_may_be(in_size: int, parts: int) -> None:
    assert in_place.count_parts(in_size) == parts


@pytest.mark.parametrize(
    ("processor", "rows", "in_size", "dtype", "is_read"),
    [
        ("none", 1, 576, "bfloat16", True),
        ("none", MOST_ROWS, 576, "int8", True),
        ("none", MOST_ROWS + 1, 576, "bfloat16", False),
        ("none", 1, 575, "bfloat16", False),
        ("none", 1, 544, "bfloat16", False),
        ("none", 1, 576, "float32", False),
        ("tiles", 1, 576, "bfloat16", False),
        ("vectors", 1, 576, "int8", False),
        ("unknown", 1, 576, "bfloat16", False),
    ],
)
def test_it_is_for_few_rows_on_processors_that_multiply_no_bf16(
    monkeypatch, processor: str, rows: int, in_size: int, dtype: str, is_read: bool
) -> None:
    monkeypatch.setattr(in_place, "bf16_products", lambda: processor)

    assert reads_in_place(jnp.ones((rows, in_size)), jnp.ones((3, 8, in_size), dtype)) == is_read


def test_programs_of_accelerators_do_not_depend_on_the_processor(monkeypatch) -> None:
    monkeypatch.setattr(in_place, "bf16_products", lambda: "none")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    assert not reads_in_place(jnp.ones((1, 576)), jnp.ones((8, 576), "bfloat16"))
