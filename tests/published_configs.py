"""A published config.json of each family, for tests that change them."""

from __future__ import annotations

from tests.unit.models.configs.test_deepseek_v3 import DEEPSEEK_R1, KIMI_K2_INSTRUCT
from tests.unit.models.configs.test_gemma3 import GEMMA_1B
from tests.unit.models.configs.test_glm4_moe import GLM_4_5
from tests.unit.models.configs.test_gpt_oss import GPT_OSS_20B
from tests.unit.models.published import PUBLISHED as MODELS

AWQ = {
    "bits": 4,
    "group_size": 128,
    "modules_to_not_convert": None,
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}
GPTQ = {
    "bits": 4,
    "checkpoint_format": "gptq",
    "desc_act": False,
    "group_size": 128,
    "quant_method": "gptq",
    "sym": True,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}

MISTRAL_7B = MODELS["Mistral-7B-v0.3"].config | {"sliding_window": 4096}

MIXTRAL_8X7B = MISTRAL_7B | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
}

PUBLISHED: dict[str, dict[str, object]] = {
    "deepseek_v3": DEEPSEEK_R1,
    "gemma3": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {k: v for k, v in GEMMA_1B.items() if k != "architectures"},
    },
    "gemma3_text": GEMMA_1B,
    "glm4_moe": GLM_4_5,
    "gpt_oss": GPT_OSS_20B,
    "kimi_k2": KIMI_K2_INSTRUCT,
    "llama": MODELS["Llama-3.1-8B"].config,
    "mistral": MISTRAL_7B,
    "mixtral": MIXTRAL_8X7B,
    "qwen2": MODELS["Qwen2.5-7B"].config | {"quantization_config": AWQ, "rope_scaling": YARN},
    "qwen3": MODELS["Qwen3-8B"].config | {"quantization_config": GPTQ},
    "qwen3_moe": MODELS["Qwen3-Coder-480B-A35B"].config,
}
"""By model_type."""
