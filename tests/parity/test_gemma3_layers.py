"""The parts of Gemma 3's layers, one by one."""

import jax.numpy as jnp
import pytest

from pals.models.rope import rotate
from tests.parity.layers import Parts, assert_same, parts_of
from tests.parity.matrix import PROMPT
from tests.parity.test_gemma3_parity import ROPES

pytestmark = pytest.mark.parity

LAYER_TYPES = ["sliding_attention", "full_attention"]
NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)

parts = parts_of(
    {
        "gemma3": (
            "Gemma3ForCausalLM",
            {
                "attention_bias": True,
                "head_dim": 20,
                "layer_types": LAYER_TYPES,
                "num_hidden_layers": 2,
                "query_pre_attn_scalar": 7,
                "rope_parameters": ROPES,
                "sliding_window": 6,
            },
        ),
    }
)


def test_embeddings_are_scaled_as_in_transformers(parts: Parts):
    import torch

    with torch.no_grad():
        expected = parts.theirs.model.embed_tokens(torch.tensor([PROMPT])).numpy()

    assert_same(parts.ours.embed(jnp.array([PROMPT])), expected, "embed_tokens")


def test_norms_are_those_of_transformers(parts: Parts):
    theirs, ours = parts.theirs.model, parts.ours

    for number, layer in enumerate(ours.layers):
        for name in NORMS:
            found = getattr(layer, name)(parts.tokens)
            assert_same(found, parts.call(getattr(theirs.layers[number], name)), f"{number}.{name}")
    assert_same(ours.norm(parts.tokens), parts.call(theirs.norm), "norm")


@pytest.mark.parametrize("layer", range(len(LAYER_TYPES)))
def test_norms_of_heads_are_those_of_transformers(parts: Parts, layer):
    heads = parts.with_hidden(parts.hidden[..., None, :20])

    for name in ("q_norm", "k_norm"):
        found = getattr(parts.ours.layers[layer].self_attn, name)(heads.tokens)
        theirs = getattr(parts.theirs.model.layers[layer].self_attn, name)
        assert_same(found, heads.call(theirs), name)


@pytest.mark.parametrize("layer", range(len(LAYER_TYPES)))
def test_each_type_of_layer_has_its_own_rotary_embedding(parts: Parts, layer):
    import torch
    from transformers.models.gemma3.modeling_gemma3 import apply_rotary_pos_emb

    table = parts.rows().rope[parts.ours.config.attention[layer].rope]
    heads = parts.hidden[..., None, : table.cos.shape[-1]]
    theirs = torch.tensor(heads).transpose(1, 2)

    expected, _ = apply_rotary_pos_emb(theirs, theirs, *parts.their_tables(LAYER_TYPES[layer]))

    assert_same(rotate(jnp.array(heads), table), expected.transpose(1, 2).numpy(), "rope")


@pytest.mark.parametrize("layer", range(len(LAYER_TYPES)))
def test_attention_is_that_of_transformers(parts: Parts, layer):
    window = parts.ours.config.attention[layer].window
    expected = parts.their_attention(layer, LAYER_TYPES[layer], window=window)

    found, _ = parts.our_attention(layer)

    assert_same(found, expected, LAYER_TYPES[layer])


def test_mlp_is_that_of_transformers(parts: Parts):
    for number, layer in enumerate(parts.ours.layers):
        found = layer.mlp(parts.tokens)
        assert_same(found, parts.call(parts.theirs.model.layers[number].mlp), f"{number}")
