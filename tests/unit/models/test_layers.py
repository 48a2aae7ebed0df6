import jax.numpy as jnp
import numpy as np
import pytest

from pals.models.layers import Embedding, GatedMLP, Linear, RMSNorm, matmul_transposed, softcap
from pals.models.numerics import Numerics

F32 = Numerics(compute=jnp.dtype(jnp.float32))
BF16 = Numerics(compute=jnp.dtype(jnp.bfloat16))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_matmul_transposed_equals_numpy(rows):
    x, matrix = draw(rows, 16), draw(8, 16, seed=1)

    np.testing.assert_allclose(matmul_transposed(x, matrix), x @ matrix.T, atol=1e-5)


def test_matmul_of_bf16_accumulates_in_float32():
    x = jnp.ones((1, 1000), jnp.bfloat16)

    product = matmul_transposed(x, jnp.ones((1, 1000), jnp.bfloat16))

    assert product.dtype == jnp.float32
    assert product[0, 0] == 1000.0


def test_linear_adds_its_bias():
    linear = Linear(4, 3, bias=True, numerics=F32)
    linear.weight[...] = draw(3, 4)
    linear.bias[...] = jnp.array([1.0, 2.0, 3.0])
    x = draw(5, 4, seed=1)

    np.testing.assert_allclose(linear(x), x @ draw(3, 4).T + [1.0, 2.0, 3.0], atol=1e-5)


def test_rms_norm_equals_numpy():
    norm = RMSNorm(16, eps=1e-2, numerics=F32)
    norm.weight[...] = draw(16)
    x = draw(2, 3, 16, seed=1)

    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-2) * draw(16)
    np.testing.assert_allclose(norm(x), expected, atol=1e-5)


def test_rms_norm_of_bf16_has_its_statistics_in_float32():
    norm = RMSNorm(4096, eps=1e-6, numerics=BF16)

    assert jnp.all(norm(jnp.full((1, 4096), 3.0, jnp.bfloat16)) == 1.0)


def test_embedding_looks_up_and_attends():
    embedding = Embedding(5, 4, numerics=F32)
    embedding.weight[...] = draw(5, 4)
    x = draw(3, 4, seed=1)

    np.testing.assert_array_equal(embedding(jnp.array([[4, 0]])), draw(5, 4)[[[4, 0]]])
    np.testing.assert_allclose(embedding.attend(x), x @ draw(5, 4).T, atol=1e-5)


def test_gated_mlp_equals_numpy():
    mlp = GatedMLP(4, 6, numerics=F32)
    gate, up, down = draw(6, 4), draw(6, 4, seed=1), draw(4, 6, seed=2)
    mlp.gate_proj.weight[...] = gate
    mlp.up_proj.weight[...] = up
    mlp.down_proj.weight[...] = down
    x = draw(3, 4, seed=3)

    hidden = x @ gate.T
    expected = (hidden / (1 + np.exp(-hidden)) * (x @ up.T)) @ down.T
    np.testing.assert_allclose(mlp(x), expected, atol=1e-5)


def test_rms_norm_with_an_offset_adds_it_before_rounding():
    norm = RMSNorm(4, eps=1e-6, numerics=BF16, offset=1.0)
    norm.weight[...] = jnp.full(4, 1 / 512, jnp.bfloat16)

    normed = norm(jnp.full((1, 4), 256.0, jnp.bfloat16)).astype(jnp.float32)

    # 1 + 1/512 is no bf16, but 1.00195 * 1.0 rounded once is 1.0, and not 1.0039
    np.testing.assert_array_equal(normed, np.ones((1, 4)))


def test_softcap_stays_within_its_range_and_is_flat_near_zero():
    x = jnp.array([-1e4, -0.01, 0.0, 0.01, 1e4])

    np.testing.assert_allclose(softcap(x, 30.0), [-30, -0.01, 0, 0.01, 30], atol=1e-5)
