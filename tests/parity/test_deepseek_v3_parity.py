"""DeepSeek V3 and Kimi K2: latent attention, grouped routing, shared experts, YaRN."""

from tests.parity.matrix import ParityMatrix, references_of

COMMON = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 28,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

reference, first_reference = references_of(
    "DeepseekV3ForCausalLM",
    {
        "grouped-yarn": {**COMMON, "rope_parameters": YARN_ROPE},
        "one-group-two-shared": {
            **COMMON,
            "first_k_dense_replace": 0,
            "num_hidden_layers": 2,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "routed_scaling_factor": 0.7,
            "q_lora_rank": None,
            "rope_interleave": False,
            "tie_word_embeddings": True,
        },
        "biases-yarn-unequal": {
            **COMMON,
            "num_hidden_layers": 2,
            "num_key_value_heads": 3,
            "num_attention_heads": 3,
            "attention_bias": True,
            "v_head_dim": 16,
            "rope_parameters": {**YARN_ROPE, "mscale": 0.707, "mscale_all_dim": 0.5},
        },
        "dense": {
            **COMMON,
            "num_hidden_layers": 2,
            "first_k_dense_replace": 2,
            "q_lora_rank": None,
            "attention_bias": True,
            "rope_parameters": {**YARN_ROPE, "mscale_all_dim": None},
        },
    },
)


class TestDeepseekV3(ParityMatrix):
    pass
