"""Gemma 3 inside a model that sees images too, whose vision tower stays where it is."""

from tests.parity.matrix import ParityMatrix, references_of
from tests.parity.test_gemma3_parity import GEMMA

TEXT = {
    **GEMMA,
    "initializer_range": 0.05,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "sliding_window": 20,
    "layer_types": ["sliding_attention", "full_attention"],
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 12,
    "image_size": 28,
    "intermediate_size": 20,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "patch_size": 14,
    "vision_use_head": False,
}

reference, first_reference = references_of(
    "Gemma3ForConditionalGeneration",
    {"text-in-images": {"text_config": TEXT}},
    common={
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": 300,
        "eos_token_id": GEMMA["eos_token_id"],
    },
)


class TestGemma3Multimodal(ParityMatrix):
    pass
