"""Llama: every rope scaling, grouped heads, tied and untied heads, biases."""

from tests.parity.matrix import ParityMatrix, references_of

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}

reference, first_reference = references_of(
    "LlamaForCausalLM",
    {
        "tied-gqa": {"tie_word_embeddings": True},
        "untied-mha": {"num_key_value_heads": 4, "rope_parameters": {"rope_theta": 500.0}},
        "mqa-wide-heads": {"num_key_value_heads": 1, "head_dim": 32, "num_hidden_layers": 2},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "llama3-rope": {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
        "linear-rope": {
            "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0},
            "num_hidden_layers": 2,
        },
        "dynamic-rope": {
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
            "num_hidden_layers": 2,
        },
        "yarn-rope": {"rope_parameters": YARN_ROPE},
        "yarn-rope-whole-range": {
            "rope_parameters": {
                **YARN_ROPE,
                "truncate": False,
                "attention_factor": 1.3,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
            },
            "num_hidden_layers": 2,
        },
    },
)


class TestLlama(ParityMatrix):
    pass
