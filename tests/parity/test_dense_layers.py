"""The parts of the dense families' layers, one by one."""

import jax.numpy as jnp
import pytest

from pals.models.rope import rotate
from tests.parity.layers import Parts, assert_same, parts_of
from tests.parity.test_llama_parity import LLAMA3_ROPE

pytestmark = pytest.mark.parity

parts = parts_of(
    {
        "llama": (
            "LlamaForCausalLM",
            {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE},
        ),
        "mistral": ("MistralForCausalLM", {"sliding_window": 6, "head_dim": 20}),
        "qwen2": (
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        ),
        "qwen3": ("Qwen3ForCausalLM", {"head_dim": 28, "num_key_value_heads": 1}),
    }
)


def test_norms_are_those_of_transformers(parts: Parts):
    theirs, ours = parts.theirs.model, parts.ours

    for number, layer in enumerate(ours.layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            found = getattr(layer, name)(jnp.array(parts.hidden))
            assert_same(found, parts.call(getattr(theirs.layers[number], name)), f"{number}.{name}")
    assert_same(ours.norm(jnp.array(parts.hidden)), parts.call(theirs.norm), "norm")


def test_rotary_embedding_is_that_of_transformers(parts: Parts):
    import torch
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    (table,) = parts.rows().rope
    heads = parts.hidden[..., None, : table.cos.shape[-1]]
    theirs = torch.tensor(heads).transpose(1, 2)

    expected, _ = apply_rotary_pos_emb(theirs, theirs, *parts.their_tables())

    assert_same(rotate(jnp.array(heads), table), expected.transpose(1, 2).numpy(), "rope")


def test_attention_is_that_of_transformers(parts: Parts):
    for layer, attention in enumerate(parts.ours.config.attention):
        found, _ = parts.our_attention(layer)
        assert_same(found, parts.their_attention(layer, window=attention.window), f"{layer}")


def test_mlp_is_that_of_transformers(parts: Parts):
    for number, layer in enumerate(parts.ours.layers):
        found = layer.mlp(jnp.array(parts.hidden))
        assert_same(found, parts.call(parts.theirs.model.layers[number].mlp), f"{number}")
