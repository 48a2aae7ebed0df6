"""The parts of GLM-4.5's layers, one by one."""

import jax.numpy as jnp
import pytest

from pals.models.rope import rotate
from tests.parity.layers import Parts, assert_same, parts_of
from tests.parity.test_glm4_moe_parity import COMMON

pytestmark = pytest.mark.parity

parts = parts_of(
    {
        "glm4_moe": (
            "Glm4MoeForCausalLM",
            {**COMMON, "num_hidden_layers": 2, "attention_bias": True, "use_qk_norm": True},
        ),
    }
)


def test_norms_are_those_of_transformers(parts: Parts):
    parts.assert_same_norms()


def test_rotary_embedding_turns_the_first_half_of_each_head(parts: Parts):
    import torch
    from transformers.models.glm4_moe.modeling_glm4_moe import apply_rotary_pos_emb

    (table,) = parts.rows().rope
    heads = parts.hidden[..., None, : COMMON["head_dim"]]
    theirs = torch.tensor(heads).transpose(1, 2)

    expected, _ = apply_rotary_pos_emb(theirs, theirs, *parts.their_tables())

    assert table.cos.shape[-1] == COMMON["head_dim"] // 2
    assert_same(rotate(jnp.array(heads), table), expected.transpose(1, 2).numpy(), "rope")


def test_attention_is_that_of_transformers(parts: Parts):
    for layer in range(2):
        found, _ = parts.our_attention(layer)
        assert_same(found, parts.their_attention(layer), f"{layer}")


def test_router_chooses_as_transformers_does(parts: Parts):
    parts.assert_same_routing(layer=1)


def test_mlp_and_experts_are_those_of_transformers(parts: Parts):
    for layer in range(2):
        found = parts.ours.layers[layer].mlp(parts.tokens)
        assert_same(found, parts.call(parts.theirs.model.layers[layer].mlp), f"{layer}")
