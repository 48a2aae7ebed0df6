import pytest

from pals.errors import CorruptModel, UnsupportedModel
from pals.models.config import RopeConfig, YarnScaling
from pals.models.configs import read_config
from pals.models.configs.moe import RouterConfig

GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}
"""config.json of openai/gpt-oss-20b."""

GPT_OSS_120B = {
    **GPT_OSS_20B,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "num_hidden_layers": 36,
    "num_local_experts": 128,
}
"""config.json of openai/gpt-oss-120b."""

SPARSE_KEYS = ("head_dim", "layer_types", "rope_scaling", "rope_theta", "swiglu_limit")


@pytest.mark.parametrize(
    ("values", "layers", "experts", "billions"),
    [(GPT_OSS_20B, 24, 32, 20.9), (GPT_OSS_120B, 36, 128, 116.8)],
)
def test_published_sizes_are_read(values, layers, experts, billions):
    config = read_config(values)

    assert config.num_layers == layers
    assert [attention.window for attention in config.attention] == [128, None] * (layers // 2)
    assert config.moe[0].router == RouterConfig(
        kind="topk_softmax", num_experts=experts, num_experts_per_tok=4, bias=True
    )
    assert config.parameter_count == pytest.approx(billions * 1e9, rel=0.005)


def test_what_20b_says_is_read():
    config = read_config(GPT_OSS_20B)

    (rope,) = config.rope
    assert (rope.theta, rope.width) == (150_000.0, 64)
    assert rope.scaling == YarnScaling(
        factor=32.0,
        attention_factor=pytest.approx(1.3465735902799727),
        beta_fast=32.0,
        beta_slow=1.0,
        original_max_position_embeddings=4096,
        truncate=False,
    )
    attention = config.attention[0]
    assert (attention.num_heads, attention.num_kv_heads, attention.scale) == (64, 8, 64**-0.5)
    assert attention.sinks
    assert attention.qkv_bias
    assert attention.output_bias
    assert (config.moe[0].bias, config.moe[0].swiglu_limit) == (True, 7.0)
    assert not config.tie_word_embeddings


def test_what_a_config_leaves_out_has_the_defaults_of_transformers():
    short = {key: value for key, value in GPT_OSS_20B.items() if key not in SPARSE_KEYS}

    assert read_config(short) == read_config(GPT_OSS_20B)


def test_both_spellings_of_rope_give_one_config():
    rope = {**GPT_OSS_20B["rope_scaling"], "rope_theta": 150000}
    five = {**GPT_OSS_20B, "rope_scaling": None, "rope_theta": None, "rope_parameters": rope}

    assert read_config(five) == read_config(GPT_OSS_20B)


def test_rope_may_be_plain():
    config = read_config({**GPT_OSS_20B, "rope_scaling": {"rope_type": "default"}})

    assert config.rope == (RopeConfig(theta=150_000.0, width=64),)


def test_switches_are_read_at_their_other_values():
    config = read_config(
        {
            **GPT_OSS_20B,
            "attention_bias": False,
            "layer_types": ["full_attention"] * 24,
            "sliding_window": None,
            "swiglu_alpha": 1.5,
            "swiglu_limit": 3.0,
        }
    )

    assert not config.attention[0].qkv_bias
    assert not config.attention[0].output_bias
    assert {attention.window for attention in config.attention} == {None}
    assert (config.moe[0].swiglu_alpha, config.moe[0].swiglu_limit) == (1.5, 3.0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"experts_per_token": 2}, "experts_per_token"),
        ({"layer_types": ["chunked_attention"] * 24}, "chunked_attention"),
        ({"attention_chunk_size": 64}, "attention_chunk_size"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change, named):
    with pytest.raises(UnsupportedModel, match=named):
        read_config({**GPT_OSS_20B, **change})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sliding_window": None}, "sliding_window"),
        ({"num_experts_per_tok": 33, "experts_per_token": 33}, "33 of 32"),
        ({"num_experts": 16}, "number of experts"),
        ({"swiglu_limit": -7.0}, "swiglu_limit"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
    ],
)
def test_values_that_cannot_be_are_corrupt(change, named):
    with pytest.raises(CorruptModel, match=named):
        read_config({**GPT_OSS_20B, **change})
