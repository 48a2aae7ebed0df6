"""GLM-4.5 and 4.6: partly turned heads, routing with a correction bias, shared experts."""

from tests.parity.matrix import ParityMatrix, references_of

COMMON = {
    "head_dim": 20,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 28,
    "n_routed_experts": 7,
    "num_experts_per_tok": 3,
}

reference, first_reference = references_of(
    "Glm4MoeForCausalLM",
    {
        "bias-qk-norm": {
            **COMMON,
            "attention_bias": True,
            "use_qk_norm": True,
            "rope_parameters": {"rope_theta": 1000.0, "partial_rotary_factor": 0.3},
        },
        "plain-grouped": {
            **COMMON,
            "num_hidden_layers": 2,
            "first_k_dense_replace": 0,
            "n_routed_experts": 9,
            "num_experts_per_tok": 4,
            "n_group": 3,
            "topk_group": 2,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "routed_scaling_factor": 2.5,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        },
    },
)


class TestGlm4Moe(ParityMatrix):
    pass
