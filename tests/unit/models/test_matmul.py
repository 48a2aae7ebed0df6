from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pals.models import matmul
from pals.models.matmul import FEW_ROWS, matmul_transposed

MATRIX_FIRST = "dot(matrix, rows)"
ROWS_FIRST = "dot(rows, matrix)"


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def order_of(rows: int, dtype: str) -> str:
    """Return which operand of the compiled product comes first."""
    x, matrix = jnp.ones((rows, 32), dtype), jnp.ones((48, 32), dtype)
    text = jax.jit(matmul_transposed).lower(x, matrix).as_text()
    product = next(line for line in text.splitlines() if "dot_general" in line)
    return MATRIX_FIRST if "(tensor<48x32x" in product else ROWS_FIRST


@pytest.mark.parametrize("has_tiles", [True, False])
@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
def test_products_are_the_same_on_every_processor(monkeypatch, rows: int, has_tiles: bool) -> None:
    monkeypatch.setattr(matmul, "has_bf16_tiles", lambda: has_tiles)
    x, matrix = draw(rows, 32), draw(48, 32, seed=1)

    product = matmul_transposed(x, matrix)

    expected = np.asarray(x, np.float32) @ np.asarray(matrix, np.float32).T
    np.testing.assert_allclose(product, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "dtype", "has_tiles", "order"),
    [
        (1, "bfloat16", True, MATRIX_FIRST),
        (FEW_ROWS, "bfloat16", True, MATRIX_FIRST),
        (FEW_ROWS + 1, "bfloat16", True, ROWS_FIRST),
        (2, "bfloat16", False, ROWS_FIRST),
        (2, "float32", True, ROWS_FIRST),
    ],
)
def test_matrix_stands_first_where_that_is_faster(
    monkeypatch, rows: int, dtype: str, has_tiles: bool, order: str
) -> None:
    monkeypatch.setattr(matmul, "has_bf16_tiles", lambda: has_tiles)

    assert order_of(rows, dtype) == order
