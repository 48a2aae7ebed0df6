import pytest

from pals.errors import CorruptModel, UnsupportedModel
from pals.models.config import RopeConfig
from pals.models.configs import read_config

GLM_4_5 = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338],
    "first_k_dense_replace": 3,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1536,
    "n_group": 1,
    "n_routed_experts": 160,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 92,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0",
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": 151552,
}
GLM_4_5_AIR = {
    **GLM_4_5,
    "first_k_dense_replace": 1,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "num_hidden_layers": 46,
    "routed_scaling_factor": 1.0,
    "use_qk_norm": False,
}
GLM_4_6 = {**GLM_4_5, "max_position_embeddings": 202752}


@pytest.mark.parametrize(
    ("values", "billions", "layers"),
    [(GLM_4_5, 353, 92), (GLM_4_5_AIR, 107, 46), (GLM_4_6, 353, 92)],
    ids=["GLM-4.5", "GLM-4.5-Air", "GLM-4.6"],
)
def test_published_configs_have_the_parameters_of_their_weights(values, billions, layers):
    config = read_config(values)

    assert round(config.parameter_count / 1e9) == billions
    assert config.num_layers == layers
    assert config.cache_shapes(0) == ((8, 128), (8, 128))


@pytest.mark.parametrize("values", [GLM_4_5, GLM_4_5_AIR])
def test_qk_norm_and_biases_are_switches(values):
    attention = read_config(values).attention[0]

    assert attention.qk_norm == values["use_qk_norm"]
    assert attention.qkv_bias
    assert not attention.output_bias


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"partial_rotary_factor": None},
        {
            "partial_rotary_factor": None,
            "rope_theta": None,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000,
                "partial_rotary_factor": 0.5,
            },
        },
    ],
    ids=["transformers-4", "default", "transformers-5"],
)
def test_half_of_a_head_turns_in_every_spelling(change):
    config = read_config({**GLM_4_5, **change})

    assert config.rope == (RopeConfig(theta=1e6, width=64),)


def test_first_layers_are_dense():
    config = read_config(GLM_4_5_AIR)

    assert [moe is None for moe in config.moe] == [True] + [False] * 45
    assert config.moe[1].router.kind == "grouped_sigmoid"
    assert config.moe[1].router.correction_bias
    assert config.num_mtp_layers == 1


@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}},
        {"hidden_act": "gelu"},
        {"qk_layernorm": True},
        {"sliding_window": 128},
    ],
)
def test_what_is_not_implemented_is_refused(change):
    with pytest.raises(UnsupportedModel):
        read_config({**GLM_4_5, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"partial_rotary_factor": 1.5},
        {"partial_rotary_factor": 0.01},
        {"num_key_value_heads": 7},
        {"n_group": 3},
        {"num_experts_per_tok": 161},
        {"use_qk_norm": "yes"},
    ],
)
def test_values_that_cannot_be_are_corrupt(change):
    with pytest.raises(CorruptModel):
        read_config({**GLM_4_5, **change})
