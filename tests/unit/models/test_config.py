import ast
import dataclasses
from pathlib import Path

import pytest

import pals
from pals.errors import CorruptModel, UnsupportedModel
from pals.models.config import Llama3Scaling, ModelConfig, RopeConfig
from pals.models.configs import read_config

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 259,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_both_spellings_of_rope_give_one_config():
    four = read_config({**LLAMA, "rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE})
    five = read_config({**LLAMA, "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}})

    assert four == five
    scaling = Llama3Scaling(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    assert four.rope == (RopeConfig(theta=5e5, width=16, scaling=scaling),)


def test_defaults_follow_from_other_keys():
    config = read_config({**LLAMA, "num_key_value_heads": None, "rope_scaling": None})

    assert (config.attention[0].num_kv_heads, config.attention[0].head_dim) == (4, 16)
    assert config.rope == (RopeConfig(theta=10000.0, width=16),)


@pytest.mark.parametrize(("value", "ids"), [(2, (2,)), ([2, 7], (2, 7)), (None, ())])
def test_eos_token_ids_are_a_tuple(value, ids):
    assert read_config({**LLAMA, "eos_token_id": value}).eos_token_ids == ids


def test_keys_of_training_and_other_programs_are_ignored():
    extra = {"torch_dtype": "bfloat16", "dtype": "bfloat16", "use_cache": True, "some_flag": False}

    assert read_config({**LLAMA, **extra}) == read_config(LLAMA)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mamba"},
        {"model_type": ["llama"]},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"hidden_act": "gelu"},
        {"sliding_window": 4096},
        {"quantization_config": {"bits": 4}},
        {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
        {"auto_map": {"AutoConfig": "evil.Config"}},
        {"rope_scaling": {"rope_type": {}, "factor": 4.0}},
        {"rope_parameters": {**LLAMA3_ROPE, "attention_factor": 2.0}},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 2**40},
        {"hidden_size": 2**4000},
        {"num_hidden_layers": 1024, "hidden_size": 2**17, "intermediate_size": 2**20},
    ],
)
def test_what_is_not_implemented_is_refused(change):
    with pytest.raises(UnsupportedModel) as caught:
        read_config({**LLAMA, **change})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": -4},
        {"num_attention_heads": True},
        {"num_attention_heads": "4"},
        {"num_key_value_heads": 3},
        {"hidden_size": 64.0},
        {"head_dim": 15},
        {"rms_norm_eps": 0},
        {"rms_norm_eps": float("nan")},
        {"rope_theta": 10**400},
        {"rope_scaling": ["llama3"]},
        {"rope_scaling": {**LLAMA3_ROPE, "factor": None}},
        {"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 4.0}},
        {"attention_bias": "yes"},
        {"eos_token_id": 259},
        {"eos_token_id": ["2"]},
        {"eos_token_id": list(range(100))},
    ],
)
def test_values_that_cannot_be_are_corrupt(change):
    with pytest.raises(CorruptModel):
        read_config({**LLAMA, **change})


def test_missing_key_is_named():
    config = {key: value for key, value in LLAMA.items() if key != "vocab_size"}

    with pytest.raises(CorruptModel) as caught:
        read_config(config)
    assert "vocab_size" in caught.value.fields["problem"]


def test_every_field_is_read_outside_the_config():
    read = set()
    for path in Path(pals.__file__).parent.rglob("*.py"):
        if path.name != "config.py":
            tree = ast.parse(path.read_text())
            read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}

    assert {field.name for field in dataclasses.fields(ModelConfig)} - read == set()
