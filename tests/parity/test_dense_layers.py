"""The parts of the dense families' layers, one by one."""

import pytest

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
    parts.assert_same_norms()


def test_rotary_embedding_is_that_of_transformers(parts: Parts):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    parts.assert_same_turns(apply_rotary_pos_emb)


def test_attention_is_that_of_transformers(parts: Parts):
    for layer, attention in enumerate(parts.ours.config.attention):
        found, _ = parts.our_attention(layer)
        assert_same(found, parts.their_attention(layer, window=attention.window), f"{layer}")


def test_mlp_is_that_of_transformers(parts: Parts):
    for number, layer in enumerate(parts.ours.layers):
        found = layer.mlp(parts.tokens)
        assert_same(found, parts.call(parts.theirs.model.layers[number].mlp), f"{number}")
