import pytest

from pals.errors import CorruptModel, UnsupportedModel
from pals.models.config import LinearScaling, RopeConfig
from pals.models.configs import read_config

GEMMA_270M = {
    "_sliding_window_pattern": 6,
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 640,
    "initializer_range": 0.02,
    "intermediate_size": 2048,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.55.0.dev0",
    "use_bidirectional_attention": False,
    "use_cache": True,
    "vocab_size": 262144,
}
"""config.json of google/gemma-3-270m."""

GEMMA_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}
"""config.json of google/gemma-3-1b-it."""

MULTIMODAL = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
GEMMA_4B = {
    **MULTIMODAL,
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}
"""config.json of google/gemma-3-4b-it."""

GEMMA_27B = {
    **MULTIMODAL,
    "text_config": {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "model_type": "gemma3_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}
"""config.json of google/gemma-3-27b-it."""


def text_of_27b(**changes):
    return {**GEMMA_27B, "text_config": {**GEMMA_27B["text_config"], **changes}}


@pytest.mark.parametrize(
    ("values", "layers", "global_layers", "window", "billions"),
    [
        (GEMMA_270M, 18, 3, 512, 0.27),
        (GEMMA_1B, 26, 4, 512, 1.0),
        (GEMMA_4B, 34, 5, 1024, 3.9),
        (GEMMA_27B, 62, 10, 1024, 27.0),
    ],
)
def test_published_sizes_are_read(values, layers, global_layers, window, billions):
    config = read_config(values)

    assert config.num_layers == layers
    windows = [attention.window for attention in config.attention]
    assert windows.count(None) == global_layers
    assert set(windows) == {None, window}
    assert config.parameter_count == pytest.approx(billions * 1e9, rel=0.02)


def test_what_27b_says_and_leaves_out_is_read():
    config = read_config(GEMMA_27B)

    assert config.vocab_size == 262_208
    assert config.max_position_embeddings == 131_072
    assert config.eos_token_ids == (1, 106)
    assert config.tie_word_embeddings
    assert config.norm_offset == 1.0
    assert config.embedding_scale == 5376**0.5
    assert config.rope == (
        RopeConfig(theta=1e6, width=128, scaling=LinearScaling(factor=8.0)),
        RopeConfig(theta=1e4, width=128),
    )
    local, whole = config.attention[4], config.attention[5]
    assert (local.window, local.rope, whole.window, whole.rope) == (1024, 1, None, 0)
    assert whole.scale == 168**-0.5


def test_heads_that_4b_leaves_out_have_the_defaults_of_transformers():
    attention = read_config(GEMMA_4B).attention[0]

    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (8, 4, 256)


def test_both_spellings_of_rope_give_one_config():
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    five = text_of_27b(rope_scaling=None, rope_parameters=ropes)

    assert read_config(five) == read_config(GEMMA_27B)


def test_each_type_of_layer_has_the_base_it_names():
    old = read_config({**GEMMA_1B, "rope_theta": 5e5, "rope_local_base_freq": 2e4})
    ropes = {"sliding_attention": {"rope_theta": 3e4}}
    new = read_config({**GEMMA_1B, "rope_parameters": ropes})

    assert [rope.theta for rope in old.rope] == [5e5, 2e4]
    assert [rope.theta for rope in new.rope] == [1e6, 3e4]


def test_layer_types_say_the_same_as_the_pattern():
    types = ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(26)]

    five = {**GEMMA_1B, "sliding_window_pattern": None, "layer_types": types}

    assert read_config(five) == read_config(GEMMA_1B)


def test_soft_cap_of_logits_is_read():
    assert read_config({**GEMMA_1B, "final_logit_softcapping": 30.0}).final_logit_softcap == 30.0
    assert read_config(GEMMA_1B).final_logit_softcap is None


def test_the_whole_model_decides_whether_its_head_is_tied():
    values = {**text_of_27b(tie_word_embeddings=True), "tie_word_embeddings": False}

    assert not read_config(values).tie_word_embeddings


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({**GEMMA_1B, "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (text_of_27b(use_bidirectional_attention=True), "use_bidirectional_attention"),
        ({**GEMMA_1B, "hidden_activation": "gelu"}, "hidden_activation"),
        ({**GEMMA_1B, "altup_num_inputs": 4}, "altup_num_inputs"),
        (text_of_27b(altup_num_inputs=4), "altup_num_inputs"),
        ({**GEMMA_27B, "audio_config": {"hidden_size": 8}}, "audio_config"),
        (text_of_27b(model_type="gemma3n_text"), "gemma3n_text"),
        ({**GEMMA_1B, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta"),
        ({**GEMMA_1B, "layer_types": ["chunked_attention"] * 26}, "chunked_attention"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(values, named):
    with pytest.raises(UnsupportedModel, match=named):
        read_config(values)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({**MULTIMODAL}, "text_config"),
        ({**MULTIMODAL, "text_config": ["gemma3_text"]}, "text_config"),
        ({**GEMMA_1B, "sliding_window": None}, "sliding_window"),
        ({**GEMMA_1B, "layer_types": ["full_attention"]}, "layer_types"),
        ({**GEMMA_1B, "query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ({**GEMMA_1B, "sliding_window_pattern": 0}, "sliding_window_pattern"),
        ({**GEMMA_1B, "rope_parameters": {"full_attention": 3}}, "full_attention"),
    ],
)
def test_values_that_cannot_be_are_corrupt(values, named):
    with pytest.raises(CorruptModel, match=named):
        read_config(values)
