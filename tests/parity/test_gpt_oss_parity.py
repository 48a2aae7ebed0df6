"""gpt-oss: sinks, alternating windows, biases, YaRN of a whole range, clamped experts."""

from tests.parity.matrix import ParityMatrix, references_of

YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 150.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 32,
}

reference, first_reference = references_of(
    "GptOssForCausalLM",
    {
        "alternating-yarn": {
            "experts_implementation": "eager",  # torch's grouped product wants even sizes
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "intermediate_size": 33,
            "head_dim": 20,
            "sliding_window": 9,
            "rope_parameters": YARN_ROPE,
        },
        "plain-rope-tight-clamp": {
            "num_hidden_layers": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "intermediate_size": 24,
            "head_dim": 8,
            "num_key_value_heads": 1,
            "attention_bias": False,
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 17,
            "swiglu_limit": 0.7,
            "swiglu_alpha": 1.1,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        },
    },
)


class TestGptOss(ParityMatrix):
    pass
