"""Gemma 3 text: local and global layers, two rotary bases, soft caps, biases, heads."""

from tests.parity.matrix import COMMON, ParityMatrix, references_of

GEMMA = {**COMMON, "initializer_range": 0.1}
"""Embeddings so small that layers, which end in a norm, outweigh the last token's own."""

ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
}

reference, first_reference = references_of(
    "Gemma3ForCausalLM",
    {
        "two-ropes": {
            "sliding_window_pattern": 2,
            "sliding_window": 11,
            "head_dim": 20,
            "query_pre_attn_scalar": 30,
            "rope_parameters": ROPES,
        },
        "soft-caps-bias-untied": {
            "attention_bias": True,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 4.0,
            "head_dim": 8,
            "layer_types": ["full_attention", "sliding_attention"],
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "sliding_window": 7,
            "tie_word_embeddings": False,
        },
    },
    common=GEMMA,
)


class TestGemma3(ParityMatrix):
    pass
