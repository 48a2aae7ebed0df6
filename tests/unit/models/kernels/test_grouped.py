import jax.numpy as jnp
import numpy as np
import pytest

from pals.models.kernels.grouped import multiply_groups


@pytest.mark.parametrize("sizes", [(0, 3, 0, 9), (200, 1, 0, 40)])
def test_rows_meet_the_matrix_of_their_group(sizes):
    random = np.random.default_rng(0)
    rows = sum(sizes) + 2  # two belong to no group
    x = jnp.asarray(random.standard_normal((rows, 24)), jnp.bfloat16)
    matrices = jnp.asarray(random.standard_normal((len(sizes), 640, 24)), jnp.bfloat16)

    found = multiply_groups(x, matrices, jnp.array(sizes, jnp.int32), interpret=True)

    numbers = np.repeat(np.arange(len(sizes)), sizes)
    expected = np.einsum(
        "pi,poi->po",
        np.asarray(x, np.float32)[: len(numbers)],
        np.asarray(matrices, np.float32)[numbers],
    )
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[: len(numbers)], expected, atol=1e-4)
