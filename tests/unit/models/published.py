"""Config files of published models, as their model cards have them, and their sizes."""

from dataclasses import dataclass, field

from tests.unit.models.configs.test_deepseek_v3 import DEEPSEEK_V3


@dataclass(frozen=True)
class Published:
    """One model.

    Attributes:
        config: Its config.json.
        parameters: How many it has, as counted by its files; a tied head once.
        layers: How many it has.
    """

    config: dict[str, object] = field(repr=False)
    parameters: int
    layers: int


LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.0.dev0",
    "use_cache": True,
    "vocab_size": 32768,
}

QWEN2_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}

QWEN3_CODER = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 6144,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 262144,
    "max_window_layers": 62,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 2560,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts": 160,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def _llama(hidden: int, intermediate: int, heads: int, layers: int, count: int) -> Published:
    return Published(_sized(LLAMA3, hidden, intermediate, heads, layers), count, layers)


def _qwen3(
    hidden: int, intermediate: int, heads: int, layers: int, count: int, *, tied: bool = False
) -> Published:
    config = _sized(QWEN3, hidden, intermediate, heads, layers)
    return Published(
        config | {"tie_word_embeddings": tied, "max_window_layers": layers}, count, layers
    )


def _sized(
    common: dict[str, object], hidden: int, intermediate: int, heads: int, layers: int
) -> dict[str, object]:
    return common | {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
    }


PUBLISHED = {
    "Llama-3.1-8B": _llama(4096, 14336, 32, 32, 8_030_261_248),
    "Llama-3.1-70B": _llama(8192, 28672, 64, 80, 70_553_706_496),
    "Llama-3.1-405B": _llama(16384, 53248, 128, 126, 405_853_388_800),
    "Mistral-7B-v0.3": Published(MISTRAL_7B, 7_248_023_552, 32),
    "Qwen2.5-7B": Published(QWEN2_7B, 7_615_616_512, 28),
    "Qwen3-1.7B": _qwen3(2048, 6144, 16, 28, 1_720_574_976, tied=True),
    "Qwen3-4B": _qwen3(2560, 9728, 32, 36, 4_022_468_096, tied=True),
    "Qwen3-8B": _qwen3(4096, 12288, 32, 36, 8_190_735_360),
    "Qwen3-14B": _qwen3(5120, 17408, 40, 40, 14_768_307_200),
    "Qwen3-32B": _qwen3(5120, 25600, 64, 64, 32_762_123_264),
    "Qwen3-Coder-480B-A35B": Published(QWEN3_CODER, 480_154_875_392, 62),
    "DeepSeek-V3": Published(DEEPSEEK_V3, 671_026_419_200, 61),
}

SMALL_SIZES = {
    "bos_token_id": 256,
    "eos_token_id": 258,
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "hidden_size": 64,
    "intermediate_size": 96,
    "kv_lora_rank": 16,
    "max_position_embeddings": 512,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "n_routed_experts": 8,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "topk_group": 1,
    "v_head_dim": 16,
    "vocab_size": 259,
}


def shrink(config: dict[str, object]) -> dict[str, object]:
    """Return a config with the same switches and tiny sizes, in unquantised weights."""
    small = {key: SMALL_SIZES.get(key, value) for key, value in config.items()}
    small.pop("quantization_config", None)
    is_grouped = config["num_key_value_heads"] != config["num_attention_heads"]
    return small | {"num_key_value_heads": 2 if is_grouped else 4}
