"""A tiny config.json of each family, with the parts that set the family apart."""

from pals.models.config import ModelConfig
from pals.models.configs import read_config

DENSE = {
    "eos_token_id": 2,
    "head_dim": 16,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "vocab_size": 259,
}
GEMMA = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 16,
}
DEEPSEEK = {
    "head_dim": 8,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "topk_group": 1,
    "v_head_dim": 16,
}
OWN_KEYS: dict[str, dict[str, object]] = {
    "deepseek_v3": DEEPSEEK,
    "gemma3": {"text_config": DENSE | GEMMA | {"model_type": "gemma3_text"}},
    "gemma3_text": GEMMA,
    "glm4_moe": {
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
        "n_group": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "topk_group": 1,
    },
    "gpt_oss": {
        "intermediate_size": 32,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "sliding_window": 16,
    },
    "kimi_k2": DEEPSEEK,
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 16},
    "mixtral": {"num_experts_per_tok": 2, "num_local_experts": 4},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3_moe": {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}


def tiny_config(model_type: str) -> ModelConfig:
    """Return the checked config of a model of three layers."""
    own = OWN_KEYS[model_type]
    common = {} if "text_config" in own else DENSE
    return read_config({"model_type": model_type, **common, **own})
