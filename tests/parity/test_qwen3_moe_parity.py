"""Qwen3 MoE: both ways to weigh, dense layers among the sparse, uneven expert numbers."""

from tests.parity.matrix import ParityMatrix, references_of

reference, first_reference = references_of(
    "Qwen3MoeForCausalLM",
    {
        "normalised-step": {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            "head_dim": 16,
            "tie_word_embeddings": True,
        },
        "plain-dense-middle-window": {
            "experts_implementation": "eager",
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 33,
            "norm_topk_prob": False,
            "mlp_only_layers": [1],
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "num_key_value_heads": 1,
        },
    },
)


class TestQwen3Moe(ParityMatrix):
    pass
