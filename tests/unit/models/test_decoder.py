import jax.numpy as jnp
import pytest
from flax import nnx

from pals.models.configs import read_config
from pals.models.decoder import Decoder
from pals.models.family import family_of
from pals.models.numerics import Numerics
from pals.types import LayerRange
from tests.unit.models.test_config import LLAMA


def build(layers, **changes):
    config = read_config({**LLAMA, **changes})
    numerics = Numerics(compute=jnp.dtype(jnp.float32))
    build_layer = family_of(config).build_layer
    return nnx.eval_shape(lambda: Decoder(config, layers, numerics, build_layer))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("layers", "embeds", "ends"),
    [("0:4", True, True), ("0:2", True, False), ("1:3", False, False), ("2:4", False, True)],
)
def test_ends_are_built_at_the_ends_only(layers, embeds, ends, tied):
    model = build(LayerRange.parse(layers), tie_word_embeddings=tied)

    assert (model.embed_tokens is not None) == embeds
    assert (model.norm is not None) == ends
    assert (model.lm_head is not None) == (ends and not (tied and embeds))


def test_only_the_tail_has_logits():
    model = build(LayerRange(0, 2))

    with pytest.raises(ValueError, match="tail"):
        model.forward_logits(jnp.zeros((1, 64)))


def test_model_is_a_plain_tree():
    model = build(LayerRange(0, 4), tie_word_embeddings=True)

    graphdef, state = nnx.split(model, graph=False)

    assert nnx.merge(graphdef, state).layers
