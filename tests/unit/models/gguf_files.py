"""Small GGUF files of each architecture, written by the `gguf` package's own writer.

What llama.cpp's converter does to a checkpoint is done here again, independently of the
importer: names, the rotary order of Llama, stacked experts, Gemma's norms.
"""

from pathlib import Path

import gguf
import numpy as np

from tests import checkpoints

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
HIDDEN, INTERMEDIATE, LAYERS = 32, 64, 2
EXPERTS, EXPERT_INTERMEDIATE = 3, 32
TOKENS = [*checkpoints.byte_vocabulary(), *checkpoints.SPECIAL_TOKENS, "ab", "<tool>"]
TYPES = [1] * checkpoints.BYTES + [3] * 3 + [1, 4]

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe", "gemma3")

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
GEMMA_NAMES = NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
STACKED = {
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
}


def hf_shapes(
    architecture: str = "llama", *, tied: bool = True, biases: bool = False
) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor, as transformers writes them."""
    shapes = checkpoints.llama_shapes(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        q_size=HEADS * HEAD_DIM,
        kv_size=KV_HEADS * HEAD_DIM,
        vocab_size=len(TOKENS),
        tied=tied,
        attention_bias=biases,
        mlp_bias=biases,
    )
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        if architecture == "qwen2":
            shapes[f"{prefix}self_attn.q_proj.bias"] = (HEADS * HEAD_DIM,)
            shapes[f"{prefix}self_attn.k_proj.bias"] = (KV_HEADS * HEAD_DIM,)
            shapes[f"{prefix}self_attn.v_proj.bias"] = (KV_HEADS * HEAD_DIM,)
        if architecture in ("qwen3", "qwen3moe", "gemma3"):
            shapes[f"{prefix}self_attn.q_norm.weight"] = (HEAD_DIM,)
            shapes[f"{prefix}self_attn.k_norm.weight"] = (HEAD_DIM,)
        if architecture == "gemma3":
            shapes[f"{prefix}pre_feedforward_layernorm.weight"] = (HIDDEN,)
            shapes[f"{prefix}post_feedforward_layernorm.weight"] = (HIDDEN,)
        if architecture == "qwen3moe":
            shapes |= _expert_shapes(prefix + "mlp.")
            for name in STACKED:
                del shapes[f"{prefix}mlp.{name}.weight"]
    return shapes


def _expert_shapes(prefix: str) -> dict[str, tuple[int, ...]]:
    up, down = (EXPERT_INTERMEDIATE, HIDDEN), (HIDDEN, EXPERT_INTERMEDIATE)
    experts = {
        f"{prefix}experts.{expert}.{name}.weight": down if name == "down_proj" else up
        for expert in range(EXPERTS)
        for name in STACKED
    }
    return {f"{prefix}gate.weight": (EXPERTS, HIDDEN), **experts}


def hf_weights(
    architecture: str = "llama", *, seed: int = 0, tied: bool = True, biases: bool = False
) -> dict[str, np.ndarray]:
    """Return random float32 weights under their Hugging Face names."""
    shapes = hf_shapes(architecture, tied=tied, biases=biases)
    return checkpoints.random_weights(shapes, seed=seed, dtype=np.float32)


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """Interleave rotary halves as `LlamaModel.permute` of convert_hf_to_gguf.py does."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def to_gguf(
    weights: dict[str, np.ndarray],
    architecture: str = "llama",
    *,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
) -> dict[str, np.ndarray]:
    """Rename and change Hugging Face weights into llama.cpp's form."""
    renamed: dict[str, np.ndarray] = {}
    stacks: dict[str, list[np.ndarray]] = {}
    names = GEMMA_NAMES if architecture == "gemma3" else NAMES
    ours = {theirs: name for name, theirs in names.items()}
    for name, array in weights.items():
        stem, _, kind = name.rpartition(".")
        if architecture == "gemma3" and name.endswith("norm.weight"):
            array = array + np.float32(1)
        if not stem.startswith("model.layers."):
            renamed[f"{ours[stem]}.{kind}"] = array
            continue
        _, _, layer, rest = stem.split(".", 3)
        if rest.startswith("mlp.experts."):
            # experts come in order, as state dicts have them
            stacks.setdefault(f"blk.{layer}.{STACKED[rest.split('.')[3]]}.weight", []).append(array)
            continue
        rotary = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(rest)
        if architecture == "llama" and rotary:
            array = permute(array, rotary)
        renamed[f"blk.{layer}.{ours[rest]}.{kind}"] = array
    return renamed | {name: np.stack(arrays) for name, arrays in stacks.items()}


def model_metadata(architecture: str) -> dict[str, object]:
    values: dict[str, object] = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": INTERMEDIATE,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }
    if architecture in ("qwen3", "qwen3moe", "gemma3"):
        values |= {"attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM}
    if architecture == "qwen3moe":
        values |= {
            "expert_count": EXPERTS,
            "expert_used_count": 2,
            "expert_feed_forward_length": EXPERT_INTERMEDIATE,
        }
    if architecture == "gemma3":
        values |= {"attention.sliding_window": 16}
    return {f"{architecture}.{key}": value for key, value in values.items()}


def write_gguf(
    path: Path,
    weights: dict[str, np.ndarray],
    *,
    architecture: str = "llama",
    quantisation: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    metadata: dict[str, object] | None = None,
    tokens: list[str] = TOKENS,
) -> Path:
    """Write a GGUF file; ``weights`` are in llama.cpp's form.

    ``metadata`` replaces entries; None removes one.
    """
    writer = gguf.GGUFWriter(path, architecture)
    values: dict[str, object] = {
        "general.organization": "Test Org.",
        **model_metadata(architecture),
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
        matrix = array.ndim > 1 and "ffn_gate_inp" not in name
        kind = quantisation if matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    finish(writer)
    return path


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
