"""Qwen2: biases of queries, keys and values; windows of the last layers."""

from tests.parity.matrix import ParityMatrix, references_of

reference, first_reference = references_of(
    "Qwen2ForCausalLM",
    {
        "full": {"tie_word_embeddings": True},
        "window": {
            "use_sliding_window": True,
            "sliding_window": 12,
            "max_window_layers": 1,
            "num_key_value_heads": 4,
        },
        "yarn": {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 128,
            },
            "num_hidden_layers": 2,
        },
    },
)


class TestQwen2(ParityMatrix):
    pass
