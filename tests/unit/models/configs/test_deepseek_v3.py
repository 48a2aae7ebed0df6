import pytest

from pals.errors import CorruptModel, UnsupportedModel
from pals.models.config import RopeConfig, YarnScaling
from pals.models.configs import read_config
from pals.models.configs.moe import RouterConfig
from pals.models.configs.rope import yarn_mscale

FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
DEEPSEEK_R1 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": FP8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
DEEPSEEK_V3 = {
    **DEEPSEEK_R1,
    "aux_loss_alpha": 0.001,
    "pretraining_tp": 1,
    "seq_aux": True,
    "transformers_version": "4.33.1",
}
KIMI_K2_INSTRUCT = {
    **DEEPSEEK_V3,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "transformers_version": "4.48.3",
    "vocab_size": 163840,
}


@pytest.mark.parametrize(
    ("values", "billions"),
    [(DEEPSEEK_V3, 671), (DEEPSEEK_R1, 671), (KIMI_K2_INSTRUCT, 1026)],
    ids=["DeepSeek-V3", "DeepSeek-R1", "Kimi-K2-Instruct"],
)
def test_published_configs_have_the_parameters_of_their_model_cards(values, billions):
    config = read_config(values)

    assert round(config.parameter_count / 1e9) == billions
    assert config.family == "deepseek_v3"


def test_cache_of_a_token_is_its_latent_and_one_turned_key():
    config = read_config(DEEPSEEK_V3)

    assert {config.cache_shapes(layer) for layer in range(61)} == {((1, 576),)}


def test_first_layers_are_dense_and_all_others_alike():
    config = read_config(DEEPSEEK_V3)

    assert [moe is None for moe in config.moe] == [True] * 3 + [False] * 58
    assert config.moe[3].shared_intermediate_size == 2048
    assert config.moe[3].router == RouterConfig(
        kind="grouped_sigmoid",
        num_experts=256,
        num_experts_per_tok=8,
        num_groups=8,
        topk_groups=4,
        routed_scaling_factor=2.5,
        correction_bias=True,
    )


def test_shared_experts_are_one_of_their_joint_width():
    assert read_config({**DEEPSEEK_V3, "n_shared_experts": 3}).moe[3].shared_intermediate_size == (
        3 * 2048
    )


def test_yarn_scales_scores_by_all_dimensions_and_angles_by_the_quotient():
    config = read_config(DEEPSEEK_V3)

    assert config.attention[0].scale == pytest.approx(192**-0.5 * yarn_mscale(40, 1.0) ** 2)
    assert config.rope == (
        RopeConfig(
            theta=10000.0,
            width=64,
            scaling=YarnScaling(
                factor=40.0,
                attention_factor=1.0,
                beta_fast=32.0,
                beta_slow=1.0,
                original_max_position_embeddings=4096,
                truncate=True,
            ),
        ),
    )


@pytest.mark.parametrize(
    "rope", [None, {**YARN, "mscale_all_dim": None}, {"type": "linear", "factor": 4.0}]
)
def test_scores_are_not_scaled_without_yarn_of_all_dimensions(rope):
    config = read_config({**DEEPSEEK_V3, "rope_scaling": rope})

    assert config.attention[0].scale == pytest.approx(192**-0.5)


def test_spelling_of_transformers_5_gives_the_same_config():
    four = {**DEEPSEEK_V3, "rope_scaling": None, "rope_theta": None}
    five = {
        **four,
        "rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 10000.0},
        "head_dim": 64,
        "qk_head_dim": 192,
        "rope_interleave": True,
        "output_router_logits": False,
    }

    assert read_config(five) == read_config(DEEPSEEK_V3)


def test_queries_may_be_uncompressed_and_pairs_apart():
    config = read_config({**DEEPSEEK_V3, "q_lora_rank": None, "rope_interleave": False})

    assert config.attention[0].q_lora_rank is None
    assert not config.attention[0].interleaved


def test_layers_for_multi_token_prediction_are_counted_apart():
    assert read_config(DEEPSEEK_V3).num_mtp_layers == 1
    assert read_config(KIMI_K2_INSTRUCT).num_mtp_layers == 0
    assert read_config(DEEPSEEK_V3).num_layers == 61


@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoConfig": "configuration_other.DeepseekV3Config"}},
        {"auto_map": {"AutoConfig": ["configuration_deepseek.DeepseekV3Config"]}},
        {"auto_map": "configuration_other.DeepseekV3Config"},
        {"auto_map": {"AutoConfig": "else/repo--configuration_deepseek.DeepseekV3Config"}},
        {"scoring_func": "softmax"},
        {"topk_method": "group_limited_greedy"},
        {"moe_layer_freq": 2},
        {"num_key_value_heads": 64},
        {"head_dim": 128},
        {"hidden_act": "gelu"},
        {"n_routed_experts": 4096},
        {"index_topk": 2048},
    ],
)
def test_what_is_not_implemented_is_refused(change):
    with pytest.raises(UnsupportedModel):
        read_config({**DEEPSEEK_V3, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"n_group": 7},
        {"n_group": 256},
        {"topk_group": 9},
        {"num_experts_per_tok": 129},
        {"first_k_dense_replace": -1},
        {"qk_rope_head_dim": 63},
        {"kv_lora_rank": None},
        {"routed_scaling_factor": 0},
        {"norm_topk_prob": 1},
    ],
)
def test_values_that_cannot_be_are_corrupt(change):
    with pytest.raises(CorruptModel):
        read_config({**DEEPSEEK_V3, **change})


def test_other_families_may_not_bring_code_that_deepseek_may():
    values = {"model_type": "llama", "auto_map": DEEPSEEK_V3["auto_map"]}

    with pytest.raises(UnsupportedModel, match="auto_map"):
        read_config(values)
