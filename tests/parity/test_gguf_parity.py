"""Checkpoints of transformers, written as llama.cpp's converter writes them and imported.

The import must give the checkpoint back: the same tensors, and a config with which
transformers itself computes the same logits.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from pals.models.gguf import import_gguf
from tests.unit.models.gguf_files import TOKENS, to_gguf, write_gguf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.torch").load_file

pytestmark = [pytest.mark.parity, pytest.mark.timeout(300)]

SIZES = {
    "vocab_size": len(TOKENS),
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 256,
    "eos_token_id": 258,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
WIDE = SIZES | {"head_dim": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}


def default_rope(theta: float) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": theta}


CASES = {
    "llama": transformers.LlamaConfig(**SIZES, rope_parameters=default_rope(5e5)),
    "llama-tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-biases": transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama-3.1": transformers.LlamaConfig(**WIDE, rope_parameters=LLAMA3),
    "qwen2": transformers.Qwen2Config(**SIZES, rope_parameters=default_rope(1e6)),
    "qwen2-yarn": transformers.Qwen2Config(**SIZES, rope_parameters=YARN),
    "qwen3": transformers.Qwen3Config(**WIDE, rope_parameters=default_rope(1e6)),
    "qwen3-tied": transformers.Qwen3Config(**WIDE, tie_word_embeddings=True),
    "qwen3moe": transformers.Qwen3MoeConfig(
        **WIDE,
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **WIDE | {"num_hidden_layers": 7},
        query_pre_attn_scalar=16,
        sliding_window=8,
        final_logit_softcapping=30.0,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": default_rope(1e4),
        },
    ),
}


def metadata_of(name: str, config) -> dict[str, object]:
    """Return what `TextModel.set_gguf_parameters` of llama.cpp's converter writes."""
    architecture = name.partition("-")[0]
    ropes = config.rope_parameters
    rope = ropes.get("full_attention", ropes)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values: dict[str, object] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if architecture == "llama":
        values |= {"vocab_size": config.vocab_size, "rope.dimension_count": head_dim}
    if architecture == "qwen3moe":
        values |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    if architecture == "gemma3":
        values |= {
            "attention.sliding_window": config.sliding_window,
            "final_logit_softcapping": config.final_logit_softcapping,
            "rope.freq_base_swa": float(ropes["sliding_attention"]["rope_theta"]),
        }
    return {f"{architecture}.{key}": value for key, value in values.items()}


def make_checkpoint(config, folder: Path):
    """Save a random model whose matrices are exact in bf16 and whose vectors are not."""
    transformers.set_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim == 1:
                # on a grid that Gemma's 1 + w keeps
                tensor.copy_((torch.rand_like(tensor) * 2**16).round() / 2**16)
            else:
                tensor.copy_((torch.randn_like(tensor) * 0.3).bfloat16())
    model.eval().save_pretrained(folder)
    return model


def rope_factors(config, model) -> dict:
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return {}
    plain = rope["rope_theta"] ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
    factors = 1 / (plain * model.model.rotary_emb.inv_freq)
    return {"rope_freqs.weight": factors.float().numpy()}


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_comes_back_from_its_gguf_file(name: str, tmp_path: Path):
    config = CASES[name]
    model = make_checkpoint(config, tmp_path / "hf")
    original = {
        key: tensor.numpy() for key, tensor in load_file(tmp_path / "hf/model.safetensors").items()
    }
    architecture = name.partition("-")[0]
    path = write_gguf(
        tmp_path / "m.gguf",
        to_gguf(sorted_experts(original), architecture) | rope_factors(config, model),
        architecture=architecture,
        metadata=metadata_of(name, config),
    )

    folder = import_gguf(path, destination=tmp_path / "imported")

    imported = load_file(folder / "model.safetensors")
    assert imported.keys() == original.keys()
    for key, tensor in original.items():
        np.testing.assert_array_equal(imported[key].float().numpy(), tensor, err_msg=key)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    assert type(again) is type(model)
    ids = torch.arange(40)[None] * 7 % config.vocab_size
    with torch.no_grad():
        # the float32 grid of rope_freqs leaves a few units of the last place
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def sorted_experts(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Put experts in the order of their numbers: the converter stacks them by number."""

    def order(name: str) -> tuple[str, int]:
        stem, _, rest = name.partition(".experts.")
        return stem, int(rest.partition(".")[0]) if rest else -1

    return {name: weights[name] for name in sorted(weights, key=order)}


def test_transformers_finds_the_tokenizer_of_an_import(tmp_path: Path):
    config = CASES["llama"]
    make_checkpoint(config, tmp_path / "hf")
    weights = {k: t.numpy() for k, t in load_file(tmp_path / "hf/model.safetensors").items()}
    path = write_gguf(tmp_path / "m.gguf", to_gguf(weights), metadata=metadata_of("llama", config))
    folder = import_gguf(path, destination=tmp_path / "imported")
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    ids = loaded.apply_chat_template([{"role": "user", "content": "ab"}], return_dict=False)
    assert loaded.decode(ids) == "<|im_start|>user\nab<|im_end|>\n"
    assert json.loads((folder / "generation_config.json").read_text())["bos_token_id"] == 256
