"""Layers whose matrices are quantised, against the same layers over what they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pals.models import in_place
from pals.models.configs.moe import MoEConfig, RouterConfig
from pals.models.experts import ExpertLinear
from pals.models.in_place import MOST_ROWS
from pals.models.layers import Linear
from pals.models.matrix import QUANTIZED_LEAVES, make_weight, multiply
from pals.models.moe import MoE
from pals.models.numerics import Numerics
from pals.models.quantize import (
    dequantize_int4,
    dequantize_int8,
    quantize_int4,
    quantize_int8,
    unrotate,
)
from pals.models.quantized import FEW_ROWS
from tests.unit.models.moe_reference import run

F32 = jnp.dtype(jnp.float32)
PLAIN = Numerics(compute=F32)
KINDS = {
    "int8": Numerics(compute=F32, weights="int8", quantize_activations=False),
    "int4-32": Numerics(compute=F32, weights="int4", group_size=32),
    "int4-128": Numerics(compute=F32, weights="int4", group_size=128),
}
MANY = FEW_ROWS + 7
IN, OUT, EXPERTS = 80, 24, 3  # a partial group, and no multiple of the rotation's block

every_kind = pytest.mark.parametrize("numerics", KINDS.values(), ids=KINDS)


def draw(*shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return values / np.float32(shape[-1] ** 0.5)


def quantize(matrix, numerics):
    """Return the leaves of a matrix, and what they stand for."""
    if numerics.weights == "int8":
        int8 = quantize_int8(matrix)
        return int8._asdict(), unrotate(dequantize_int8(int8))
    int4 = quantize_int4(matrix, numerics.group_size)
    return int4._asdict(), dequantize_int4(int4, matrix.shape[1])


def fill(weight, matrices, numerics):
    """Set a weight, or a stack of them, and return the matrices that it stands for."""
    pairs = [quantize(matrix, numerics) for matrix in matrices.reshape(-1, *matrices.shape[-2:])]
    for name in pairs[0][0]:
        leaf = np.stack([leaves[name] for leaves, _ in pairs])
        getattr(weight, name)[...] = jnp.asarray(leaf if matrices.ndim == 3 else leaf[0])
    return np.stack([plain for _, plain in pairs]).reshape(matrices.shape)


def assert_close(got, wanted, *, share=2e-4):
    """Compare with a tolerance that is a share of the typical value."""
    scale = float(np.sqrt(np.mean(np.square(wanted))))
    assert scale > 0.1
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), atol=share * scale, rtol=0)


@pytest.mark.parametrize("processor", ["none", "tiles"])
@pytest.mark.parametrize("rows", [1, MOST_ROWS])
def test_int8_experts_compute_with_what_their_matrices_stand_for(monkeypatch, processor, rows):
    monkeypatch.setattr(in_place, "bf16_products", lambda: processor)
    numerics = KINDS["int8"]
    stack = make_weight((EXPERTS, OUT, 256), numerics)
    plain = fill(stack, draw(EXPERTS, OUT, 256), numerics)
    x = jnp.asarray(draw(rows, 256, seed=1) * 9)

    for expert in range(EXPERTS):
        got = jax.jit(lambda x, n: multiply(x, stack, n))(x, expert)
        assert_close(got, x @ plain[expert].T)


@every_kind
@pytest.mark.parametrize("rows", [1, FEW_ROWS, MANY])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_computes_with_what_its_matrix_stands_for(numerics, rows, bias):
    linear, plain = (Linear(IN, OUT, bias=bias, numerics=n) for n in (numerics, PLAIN))
    plain.weight[...] = jnp.asarray(fill(linear.weight, draw(OUT, IN), numerics))
    if bias:
        linear.bias[...] = plain.bias[...] = jnp.asarray(draw(OUT))
    x = jnp.asarray(draw(rows, IN, seed=1) * 9)

    assert_close(run(linear, x), run(plain, x))


@every_kind
def test_quantised_matrices_are_near_those_they_come_from(numerics):
    matrix = draw(OUT, IN)
    worst = np.abs(quantize(matrix, numerics)[1] - matrix).max() / np.abs(matrix).max()

    assert 0 < worst < (0.02 if numerics.weights == "int8" else 0.2)


def test_many_rows_may_be_rounded_to_int8_and_few_are_not():
    coarse = Numerics(compute=F32, weights="int8")
    linears = [Linear(IN, OUT, bias=False, numerics=n) for n in (coarse, KINDS["int8"])]
    for linear in linears:
        fill(linear.weight, draw(OUT, IN), coarse)
    few, many = (jnp.asarray(draw(rows, IN, seed=1) * 9) for rows in (FEW_ROWS, MANY))

    np.testing.assert_array_equal(*(run(linear, few) for linear in linears))
    rounded, exact = (np.asarray(run(linear, many)) for linear in linears)
    assert not np.array_equal(rounded, exact)
    assert_close(rounded, exact, share=0.1)


@every_kind
@pytest.mark.parametrize("expert", range(EXPERTS))
@pytest.mark.parametrize("rows", [1, MANY])
def test_an_expert_computes_with_its_own_matrix(numerics, expert, rows):
    experts = ExpertLinear(EXPERTS, IN, OUT, bias=True, numerics=numerics)
    plain = fill(experts.weight, draw(EXPERTS, OUT, IN), numerics)
    bias = draw(EXPERTS, OUT, seed=2)
    experts.bias[...] = jnp.asarray(bias)
    x = draw(rows, IN, seed=1) * 9

    found = experts.apply_one(jnp.asarray(x), jnp.int32(expert))

    assert_close(found, x @ plain[expert].T + bias[expert])


@every_kind
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_moe_layer_computes_with_what_its_matrices_stand_for(numerics, platform, tokens):
    config = MoEConfig(
        router=RouterConfig(kind="softmax_topk", num_experts=EXPERTS, num_experts_per_tok=2),
        intermediate_size=OUT,
        shared_intermediate_size=OUT,
    )
    numerics = Numerics(
        compute=F32,
        weights=numerics.weights,
        group_size=numerics.group_size,
        quantize_activations=False,
        platform=platform,
    )
    moe, plain = (MoE(config, IN, 0, n) for n in (numerics, PLAIN))
    moe.gate.weight[...] = plain.gate.weight[...] = jnp.asarray(draw(EXPERTS, IN) * 4)
    for seed, name in enumerate(
        ("experts.gate_up_proj", "experts.down_proj", *shared_projections()), start=3
    ):
        held, wide = (find(module, name).weight for module in (moe, plain))
        wide[...] = jnp.asarray(fill(held, draw(*wide.shape, seed=seed) * 3, numerics))
    x = jnp.asarray(draw(tokens, IN, seed=1) * 9)

    assert_close(run(moe, x), run(plain, x), share=5e-4)


def shared_projections():
    return [f"shared_experts.{name}_proj" for name in ("gate", "up", "down")]


def find(module, name):
    for step in name.split("."):
        module = getattr(module, step)
    return module


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("stack", [(), (EXPERTS,)])
def test_empty_matrices_have_the_shapes_that_quantising_gives(weights, stack):
    numerics = Numerics(compute=F32, weights=weights, group_size=32)
    empty = make_weight((*stack, OUT, IN), numerics)
    leaves, _ = quantize(draw(OUT, IN), numerics)

    assert leaves.keys() <= QUANTIZED_LEAVES
    for name, leaf in leaves.items():
        found = getattr(empty, name)[...]
        assert found.shape == (*stack, *leaf.shape)
        assert found.dtype == leaf.dtype


@every_kind
def test_products_of_bf16_rows_are_float32(numerics):
    weight = make_weight((OUT, IN), numerics)

    product = multiply(jnp.ones((2, IN), jnp.bfloat16), weight)

    assert (product.shape, product.dtype) == ((2, OUT), F32)
    assert isinstance(product, jax.Array)
