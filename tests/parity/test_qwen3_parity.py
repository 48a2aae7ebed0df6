"""Qwen3: norms of queries and keys, heads of a width of their own, biases, windows."""

from tests.parity.matrix import ParityMatrix, references_of

reference, first_reference = references_of(
    "Qwen3ForCausalLM",
    {
        "wide-heads": {"head_dim": 32, "tie_word_embeddings": True},
        "narrow-heads-bias": {"head_dim": 8, "attention_bias": True, "num_key_value_heads": 1},
        "window": {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 2,
        },
    },
)


class TestQwen3(ParityMatrix):
    pass
