"""config.json, and rotary scaling above all: values are what the checkpoint's author wrote."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from pals.errors import CorruptModel, UnsupportedModel
from pals.models.gguf import import_gguf
from pals.models.gguf_plan import plan_import
from pals.models.gguf_reader import read_header
from tests import checkpoints
from tests.unit.models.gguf_files import (
    ARCHITECTURES,
    EXPERT_INTERMEDIATE,
    EXPERTS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    LAYERS,
    TOKENS,
    hf_weights,
    to_gguf,
    write_gguf,
)


def config_of(
    folder: Path,
    architecture: str,
    metadata: dict[str, object] | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> dict[str, object]:
    weights = to_gguf(hf_weights(architecture), architecture) | (extra or {})
    path = folder / "m.gguf"
    write_gguf(path, weights, architecture=architecture, metadata=metadata)
    return dict(plan_import(read_header(path)).config)


COMMON = {
    "head_dim": HEAD_DIM,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": 128,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": len(TOKENS),
    "bos_token_id": checkpoints.BOS_ID,
    "eos_token_id": checkpoints.EOS_ID,
}

OWN: dict[str, dict[str, object]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
        "hidden_act": "silu",
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "use_sliding_window": False,
        "hidden_act": "silu",
    },
    "qwen3moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "use_sliding_window": False,
        "hidden_act": "silu",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": EXPERT_INTERMEDIATE,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "attention_bias": False,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": HEAD_DIM,
        "sliding_window": 16,
        "layer_types": ["sliding_attention"] * LAYERS,
        "rope_local_base_freq": 10000.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_config_is_that_of_the_family(tmp_path: Path, architecture: str):
    assert config_of(tmp_path, architecture) == COMMON | OWN[architecture]


def test_the_config_is_written_as_json(tmp_path: Path):
    file = write_gguf(tmp_path / "m.gguf", to_gguf(hf_weights()))
    assert json.loads((import_gguf(file) / "config.json").read_text()) == COMMON | OWN["llama"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qwen2.attention.sliding_window", 16),
        ("qwen3.rope.dimension_sections", [1, 1, 2, 0]),
        ("qwen3moe.expert_shared_count", 1),
        ("gemma3.attention.causal", False),
        ("llama.logit_scale", 0.5),
    ],
)
def test_a_setting_that_nothing_reads_is_named(tmp_path: Path, key: str, value: object):
    with pytest.raises(UnsupportedModel) as caught:
        config_of(tmp_path, key.partition(".")[0], {key: value})
    assert f"`{key}`" in str(caught.value)


def test_settings_without_effect_are_passed_over(tmp_path: Path):
    inert = {"llama.vocab_size": 7, "llama.attention.causal": True, "llama.pooling_type": 0}
    assert config_of(tmp_path, "llama", inert) == COMMON | OWN["llama"]


def test_the_width_of_heads_is_not_always_that_of_the_model(tmp_path: Path):
    weights = hf_weights("qwen3")
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.self_attn."
        for name, rows in (("q_proj", HEADS * 12), ("k_proj", KV_HEADS * 12)):
            weights[f"{prefix}{name}.weight"] = np.ones((rows, HIDDEN), np.float32)
        weights[f"{prefix}v_proj.weight"] = np.ones((KV_HEADS * 12, HIDDEN), np.float32)
        weights[f"{prefix}o_proj.weight"] = np.ones((HIDDEN, HEADS * 12), np.float32)
        weights[f"{prefix}q_norm.weight"] = weights[f"{prefix}k_norm.weight"] = np.ones(
            12, np.float32
        )
    path = write_gguf(
        tmp_path / "m.gguf",
        to_gguf(weights, "qwen3"),
        architecture="qwen3",
        metadata={"qwen3.attention.key_length": 12, "qwen3.attention.value_length": 12},
    )
    config = plan_import(read_header(path)).config
    assert (config["head_dim"], config["num_key_value_heads"]) == (12, KV_HEADS)


def test_widths_of_heads_that_differ_are_named(tmp_path: Path):
    with pytest.raises(UnsupportedModel, match=r"`qwen3\.attention\.value_length` 4"):
        config_of(tmp_path, "qwen3", {"qwen3.attention.value_length": 4})


def test_experts_that_are_not_normalised_say_so(tmp_path: Path):
    config = config_of(tmp_path, "qwen3moe", {"qwen3moe.expert_weights_norm": False})
    assert config["norm_topk_prob"] is False


def test_more_experts_used_than_there_are_is_corrupt(tmp_path: Path):
    with pytest.raises(CorruptModel, match="expert_used_count"):
        config_of(tmp_path, "qwen3moe", {"qwen3moe.expert_used_count": EXPERTS + 1})


# --- gemma3 --------------------------------------------------------------------------


def test_every_sixth_layer_of_gemma_is_global(tmp_path: Path):
    config = gemma_of_depth(tmp_path, 13, {})
    kinds = [str(kind)[0] for kind in config["layer_types"]]
    assert "".join(kinds) == "sssssfsssssfs"


def test_a_pattern_in_the_file_wins(tmp_path: Path):
    key = "gemma3.attention.sliding_window_pattern"
    period = gemma_of_depth(tmp_path, 4, {key: 2})["layer_types"]
    listed = gemma_of_depth(tmp_path, 4, {key: [False, True, True, False]})["layer_types"]
    assert [kind[0] for kind in period] == ["s", "f", "s", "f"]
    assert [kind[0] for kind in listed] == ["f", "s", "s", "f"]


def test_gemma_without_a_window_is_global_throughout(tmp_path: Path):
    config = config_of(tmp_path, "gemma3", {"gemma3.attention.sliding_window": None})
    assert config["layer_types"] == ["full_attention"] * LAYERS
    assert "sliding_window" not in config


def test_the_27b_scales_attention_by_hidden_size_over_heads(tmp_path: Path):
    """Its key length is 8 here as everywhere: only its 62 layers give it away."""
    assert gemma_of_depth(tmp_path, 62, {})["query_pre_attn_scalar"] == HIDDEN // HEADS
    wide = {"gemma3.attention.head_count": 2, "gemma3.attention.head_count_kv": 1}
    assert gemma_of_depth(tmp_path, 62, wide, heads=2)["query_pre_attn_scalar"] == HIDDEN // 2


def test_softcaps_and_both_rotary_bases_are_carried_over(tmp_path: Path):
    metadata = {
        "gemma3.final_logit_softcapping": 30.0,
        "gemma3.attn_logit_softcapping": 50.0,
        "gemma3.rope.freq_base": 1e6,
        "gemma3.rope.freq_base_swa": 5000.0,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
    }
    config = config_of(tmp_path, "gemma3", metadata)
    assert (config["final_logit_softcapping"], config["attn_logit_softcapping"]) == (30.0, 50.0)
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 5000.0)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}


def gemma_of_depth(
    folder: Path, num_layers: int, metadata: dict[str, object], *, heads: int = HEADS
) -> dict[str, object]:
    """Make a file whose layers all have the tensors of the first."""
    weights = to_gguf(hf_weights("gemma3"), "gemma3")
    if heads != HEADS:
        for name, array in list(weights.items()):
            if ".0.attn_" in name and array.ndim == 2:
                weights[name] = (
                    array[:, : array.shape[1] // 2]
                    if "output" in name
                    else (array[: array.shape[0] // 2])
                )
    layer = {name[6:]: array for name, array in weights.items() if name.startswith("blk.0.")}
    weights = {name: array for name, array in weights.items() if not name.startswith("blk.")}
    for index in range(num_layers):
        weights |= {f"blk.{index}.{name}": array for name, array in layer.items()}
    path = folder / "m.gguf"
    metadata = {"gemma3.block_count": num_layers} | metadata
    write_gguf(path, weights, architecture="gemma3", metadata=metadata)
    return dict(plan_import(read_header(path)).config)


# --- rotary scaling ------------------------------------------------------------------


def test_yarn_is_carried_over(tmp_path: Path):
    metadata = {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 32768,
        "qwen2.rope.scaling.yarn_attn_factor": 0.7,
        "qwen2.rope.scaling.yarn_beta_fast": 30.0,
        "qwen2.rope.scaling.yarn_beta_slow": 1.5,
    }
    assert config_of(tmp_path, "qwen2", metadata)["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "attention_factor": 0.7,
        "beta_fast": 30.0,
        "beta_slow": 1.5,
    }


def test_an_extrapolation_factor_of_yarn_is_refused(tmp_path: Path):
    metadata = {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 32768,
        "qwen2.rope.scaling.yarn_ext_factor": 0.5,
    }
    with pytest.raises(UnsupportedModel, match="yarn_ext_factor"):
        config_of(tmp_path, "qwen2", metadata)


def converters_factors(
    theta: float, head_dim: int, *, factor: float, low: float, high: float, context: int
) -> np.ndarray:
    """The tensor that `LlamaModel.generate_extra_tensors` of llama.cpp writes."""
    factors = []
    for exponent in np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim):
        wavelength = 2 * math.pi * np.float32(theta) ** exponent
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def scaling_of(folder: Path, head_dim: int, theta: float, factors: np.ndarray) -> object:
    """Import a model of one head of ``head_dim`` with these factors."""
    weights = {
        "token_embd.weight": np.zeros((len(TOKENS), head_dim), np.float32),
        "output_norm.weight": np.ones(head_dim, np.float32),
        "rope_freqs.weight": factors,
    }
    for name in ("attn_norm", "ffn_norm"):
        weights[f"blk.0.{name}.weight"] = np.ones(head_dim, np.float32)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        weights[f"blk.0.{name}.weight"] = np.ones((head_dim, head_dim), np.float32)
    metadata = {
        "llama.block_count": 1,
        "llama.embedding_length": head_dim,
        "llama.feed_forward_length": head_dim,
        "llama.attention.head_count": 1,
        "llama.attention.head_count_kv": 1,
        "llama.rope.freq_base": theta,
    }
    path = write_gguf(folder / "m.gguf", weights, metadata=metadata)
    return plan_import(read_header(path)).config["rope_scaling"]


@pytest.mark.parametrize(
    ("head_dim", "theta", "factor", "low", "high"),
    [
        (128, 500_000.0, 8.0, 1.0, 4.0),
        (64, 500_000.0, 32.0, 1.0, 4.0),
        (128, 500_000.0, 8.0, 1.0, 2.0),
        (128, 10_000.0, 16.0, 1.25, 8.0),
        (16, 10_000.0, 8.0, 1.0, 4.0),
    ],
    ids=["3.1", "3.2", "narrow", "other", "two-between"],
)
def test_the_scaling_of_llama_3_is_recovered_from_its_factors(
    tmp_path: Path, head_dim: int, theta: float, factor: float, low: float, high: float
):
    factors = converters_factors(theta, head_dim, factor=factor, low=low, high=high, context=8192)
    assert scaling_of(tmp_path, head_dim, theta, factors) == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": 8192,
    }


def test_another_original_context_gives_the_same_factors_again(tmp_path: Path):
    """The context counts only as a quotient with the frequency factors."""
    factors = converters_factors(500_000.0, 128, factor=8.0, low=1.0, high=4.0, context=4096)
    found = scaling_of(tmp_path, 128, 500_000.0, factors)
    assert isinstance(found, dict)
    again = converters_factors(
        500_000.0,
        128,
        factor=found["factor"],
        low=found["low_freq_factor"],
        high=found["high_freq_factor"],
        context=found["original_max_position_embeddings"],
    )
    np.testing.assert_allclose(again, factors, rtol=1e-5)


def test_factors_of_one_are_no_scaling(tmp_path: Path):
    assert scaling_of(tmp_path, 64, 10_000.0, np.ones(32, np.float32)) is None


@pytest.mark.parametrize(
    ("factors", "error"),
    [
        (np.linspace(1, 8, 32, dtype=np.float32), UnsupportedModel),
        (np.full(32, 2, np.float32), UnsupportedModel),
        (np.full(31, 1, np.float32), CorruptModel),
        (np.full(32, np.nan, np.float32), CorruptModel),
        (np.full(32, -1, np.float32), CorruptModel),
    ],
    ids=["a line", "all alike", "too few", "NaN", "negative"],
)
def test_factors_that_follow_no_rule_are_named(
    tmp_path: Path, factors: np.ndarray, error: type[Exception]
):
    with pytest.raises(error, match=r"rope_freqs\.weight"):
        scaling_of(tmp_path, 64, 10_000.0, factors)
