"""Small GGUF files, written by the `gguf` package's own writer."""

from pathlib import Path

import gguf
import numpy as np

from tests import checkpoints

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
HIDDEN, INTERMEDIATE, LAYERS = 32, 64, 2
TOKENS = [*checkpoints.byte_vocabulary(), *checkpoints.SPECIAL_TOKENS, "ab", "<tool>"]
TYPES = [1] * checkpoints.BYTES + [3] * 3 + [1, 4]

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_weights(*, seed: int = 0, tied: bool = True) -> dict[str, np.ndarray]:
    """Return random float32 weights under their Hugging Face names."""
    shapes = checkpoints.llama_shapes(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        q_size=HEADS * HEAD_DIM,
        kv_size=KV_HEADS * HEAD_DIM,
        vocab_size=len(TOKENS),
        tied=tied,
        attention_bias=False,
        mlp_bias=False,
    )
    return checkpoints.random_weights(shapes, seed=seed, dtype=np.float32)


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """Interleave rotary halves as `LlamaModel.permute` of convert_hf_to_gguf.py does."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def to_gguf(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rename and permute Hugging Face weights into llama.cpp's form."""
    renamed = {}
    ours = {theirs: name for name, theirs in NAMES.items()}
    for name, array in weights.items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(rest)
            array = permute(array, heads) if heads else array
            renamed[f"blk.{layer}.{ours[rest]}.weight"] = array
        else:
            renamed[f"{ours[stem]}.weight"] = array
    return renamed


def write_gguf(
    path: Path,
    weights: dict[str, np.ndarray],
    *,
    quantisation: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    metadata: dict[str, object] | None = None,
    tokens: list[str] = TOKENS,
) -> Path:
    """Write a llama GGUF file; ``weights`` are in llama.cpp's form.

    ``metadata`` replaces entries; None removes one.
    """
    writer = gguf.GGUFWriter(path, "llama")
    values: dict[str, object] = {
        "general.organization": "Test Org.",
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INTERMEDIATE,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": TYPES,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": checkpoints.BOS_ID,
        "tokenizer.ggml.eos_token_id": checkpoints.EOS_ID,
        "tokenizer.chat_template": checkpoints.CHAT_TEMPLATE,
    }
    for key, value in (values | (metadata or {})).items():
        add_value(writer, key, value)
    for name, array in weights.items():
        kind = quantisation if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        raw = gguf.quantize(array, kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
