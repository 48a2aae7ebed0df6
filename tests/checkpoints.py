"""Random Llama checkpoints in the Hugging Face layout, small enough to make in each test.

The tokenizer is byte-level: id ``b`` is byte ``b`` and three special tokens follow.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

BYTES = 256
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BOS_ID, START_ID, EOS_ID = range(BYTES, BYTES + len(SPECIAL_TOKENS))
VOCAB_SIZE = BYTES + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

DTYPE_NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(np.uint8): "U8",
    np.dtype(np.int32): "I32",
}


def make_llama_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    num_layers: int = 4,
    hidden_size: int = 64,
    intermediate_size: int = 96,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int | None = None,
    vocab_size: int = VOCAB_SIZE,
    tied: bool = True,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    dtype: type = np.float32,
    files: int = 1,
    config: dict[str, object] | None = None,
) -> Path:
    """Write config, weights, tokenizer and chat template; return ``folder``.

    Args:
        folder: Made when it is missing.
        seed: Equal seeds and shapes give equal bytes.
        files: Weight files; more than one writes ``model.safetensors.index.json`` too.
        config: Entries of config.json that replace or add to the usual ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    head_dim = head_dim or hidden_size // num_heads
    values: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": attention_bias,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": 4096,
        "mlp_bias": mlp_bias,
        "num_attention_heads": num_heads,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": num_kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "vocab_size": vocab_size,
    }
    values |= config or {}
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    shapes = llama_shapes(
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        q_size=num_heads * head_dim,
        kv_size=num_kv_heads * head_dim,
        vocab_size=vocab_size,
        tied=tied,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
    )
    write_weights(folder, random_weights(shapes, seed=seed, dtype=dtype), files=files)
    write_tokenizer(folder)
    return folder


def make_qwen3_moe_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    num_layers: int = 2,
    hidden_size: int = 64,
    expert_size: int = 32,
    num_experts: int = 4,
    dtype: type = np.float32,
) -> Path:
    """Write a Qwen3 MoE checkpoint whose experts have tensors of their own; return ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, object] = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "eos_token_id": EOS_ID,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": 96,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": expert_size,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts": num_experts,
        "num_experts_per_tok": 2,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": VOCAB_SIZE,
    }
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB_SIZE, hidden_size),
        "model.norm.weight": (hidden_size,),
        "lm_head.weight": (VOCAB_SIZE, hidden_size),
    }
    in_layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (64, hidden_size),
        "self_attn.k_proj": (32, hidden_size),
        "self_attn.v_proj": (32, hidden_size),
        "self_attn.o_proj": (hidden_size, 64),
        "self_attn.q_norm": (16,),
        "self_attn.k_norm": (16,),
        "input_layernorm": (hidden_size,),
        "post_attention_layernorm": (hidden_size,),
        "mlp.gate": (num_experts, hidden_size),
    }
    for expert in range(num_experts):
        in_layer[f"mlp.experts.{expert}.gate_proj"] = (expert_size, hidden_size)
        in_layer[f"mlp.experts.{expert}.up_proj"] = (expert_size, hidden_size)
        in_layer[f"mlp.experts.{expert}.down_proj"] = (hidden_size, expert_size)
    for layer in range(num_layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": s for name, s in in_layer.items()}
    write_weights(folder, random_weights(shapes, seed=seed, dtype=dtype))
    write_tokenizer(folder)
    return folder


def llama_shapes(
    *,
    num_layers: int,
    hidden_size: int,
    intermediate_size: int,
    q_size: int,
    kv_size: int,
    vocab_size: int,
    tied: bool,
    attention_bias: bool,
    mlp_bias: bool,
) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor, as transformers writes them."""
    linears = {
        "self_attn.q_proj": (q_size, hidden_size, attention_bias),
        "self_attn.k_proj": (kv_size, hidden_size, attention_bias),
        "self_attn.v_proj": (kv_size, hidden_size, attention_bias),
        "self_attn.o_proj": (hidden_size, q_size, attention_bias),
        "mlp.gate_proj": (intermediate_size, hidden_size, mlp_bias),
        "mlp.up_proj": (intermediate_size, hidden_size, mlp_bias),
        "mlp.down_proj": (hidden_size, intermediate_size, mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab_size, hidden_size)}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{prefix}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}.{name}.bias"] = (rows,)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden_size,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden_size,)
    shapes["model.norm.weight"] = (hidden_size,)
    if not tied:
        shapes["lm_head.weight"] = (vocab_size, hidden_size)
    return shapes


def random_weights(
    shapes: dict[str, tuple[int, ...]], *, seed: int, dtype: type
) -> dict[str, np.ndarray]:
    """Draw weights whose layers outweigh the embedding, so that answers do not just echo."""
    random = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes.items():
        values = random.standard_normal(shape, dtype=np.float32)
        if len(shape) == 2:
            values *= (1.0 if "embed" in name or "lm_head" in name else 3.0) / np.sqrt(shape[1])
        else:
            values *= 0.1
        if "norm" in name:
            values += 1.0
        weights[name] = values.astype(dtype)
    return weights


def write_weights(folder: Path, weights: dict[str, np.ndarray], *, files: int = 1) -> None:
    """Write one ``model.safetensors``, or several and their index."""
    if files == 1:
        write_safetensors(folder / "model.safetensors", weights)
        return
    names = sorted(weights)
    weight_map = {}
    for number in range(files):
        file_name = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = names[number * len(names) // files : (number + 1) * len(names) // files]
        write_safetensors(folder / file_name, {name: weights[name] for name in part})
        weight_map |= dict.fromkeys(part, file_name)
    total = sum(array.nbytes for array in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file: u64 header size, JSON header, little-endian data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": DTYPE_NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the ChatML template."""
    tokenizer = Tokenizer(models.BPE(vocab=byte_vocabulary(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[2],
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=2))


def byte_vocabulary() -> dict[str, int]:
    """Return GPT-2's printable character of each byte, numbered by the byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(BYTES) if byte not in shown]
    characters = {byte: chr(byte) for byte in shown}
    characters |= {byte: chr(BYTES + number) for number, byte in enumerate(hidden)}
    return {characters[byte]: byte for byte in range(BYTES)}
