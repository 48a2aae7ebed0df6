import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pals.models.attention import Attention
from pals.models.build import AbstractModel
from pals.models.configs import FAMILIES
from pals.models.decoder import Decoder
from pals.models.family import family_of
from pals.models.matrix import QUANTIZED_LEAVES
from pals.models.numerics import Numerics
from pals.models.weights import logical_path
from pals.types import LayerRange
from tests.unit.models.tiny_configs import OWN_KEYS, tiny_config

WHOLE = LayerRange(0, 3)
PLAIN = Numerics(compute=jnp.dtype(jnp.bfloat16))
QUANTIZED = {
    weights: Numerics(compute=jnp.dtype(jnp.bfloat16), weights=weights, group_size=32)
    for weights in ("int8", "int4")
}
KEPT_PLAIN = ("embed_tokens", "norm", "lm_head", "layernorm", "router", "mlp.gate.", "kv_b_proj")


def parameters_of(config, numerics, layers=WHOLE):
    return AbstractModel.build(config, layers, numerics).parameters


def named(path):
    return ".".join(map(str, path))


def test_every_family_has_a_tiny_config():
    assert OWN_KEYS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_is_a_plain_tree(model_type):
    """Flax's tree mode takes it: no parameter is shared, none is a graph's node twice."""
    config = tiny_config(model_type)
    build_layer = family_of(config).build_layer
    model = nnx.eval_shape(lambda: Decoder(config, WHOLE, PLAIN, build_layer))

    graphdef, state = nnx.split(model, graph=False)
    merged = nnx.merge(graphdef, state)

    assert len(merged.layers) == len(WHOLE)
    again = nnx.split(merged, graph=False)[1]
    assert jax.tree.leaves(state) == jax.tree.leaves(again)
    assert jax.tree.leaves(state)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("weights", QUANTIZED)
def test_only_matrices_of_layers_are_quantised(model_type, weights):
    config = tiny_config(model_type)
    plain = parameters_of(config, PLAIN)
    held = parameters_of(config, QUANTIZED[weights])

    assert {logical_path(path) for path in held} == plain.keys()
    for path, leaf in plain.items():
        quantized = path not in held
        is_matrix = len(leaf.shape) > 1 and path[-1] == "weight"
        assert quantized == (is_matrix and not any(n in named(path) for n in KEPT_PLAIN))
        if not quantized:
            assert (held[path].shape, held[path].dtype) == (leaf.shape, leaf.dtype)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("int8", {"values": ((96, 64), "int8"), "scales": ((96,), "float32")}),
        (
            "int4",
            {
                "packed": ((1, 96, 32), "uint8"),
                "scales": ((2, 96), "float32"),
                "zeros": ((2, 96), "int8"),
            },
        ),
    ],
)
def test_a_matrix_is_named_by_its_leaves(weights, expected):
    held = parameters_of(tiny_config("llama"), QUANTIZED[weights])
    prefix = ("layers", 1, "mlp", "up_proj", "weight")

    found = {path[-1]: leaf for path, leaf in held.items() if path[:-1] == prefix}

    assert {name: (leaf.shape, str(leaf.dtype)) for name, leaf in found.items()} == expected
    assert expected.keys() <= QUANTIZED_LEAVES


def test_no_plain_parameter_is_named_like_a_part_of_a_matrix():
    for model_type in FAMILIES:
        for path in parameters_of(tiny_config(model_type), PLAIN):
            assert logical_path(path) == path


def test_a_range_has_its_own_parameters_only():
    config = tiny_config("llama")

    middle = parameters_of(config, PLAIN, LayerRange(1, 2))
    tail = parameters_of(config, PLAIN, LayerRange(2, 3))

    assert {path[0] for path in middle} == {"layers"}
    assert {path[1] for path in middle} == {0}
    assert {path[0] for path in tail} == {"layers", "norm", "lm_head"}


def test_merged_parameters_stand_at_their_paths():
    model = AbstractModel.build(tiny_config("qwen3_moe"), LayerRange(1, 3), PLAIN)
    leaves = [
        jnp.full(leaf.shape, number, leaf.dtype)
        for number, leaf in enumerate(model.parameters.values())
    ]

    merged = model.merge(leaves)

    assert isinstance(merged.layers[0].self_attn, Attention)
    for number, path in enumerate(model.parameters):
        found = merged
        for step in path:
            found = found[step] if isinstance(step, int) else getattr(found, step)
        assert np.asarray(found[...], np.float32).flat[0] == number
