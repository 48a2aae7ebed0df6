"""Writes a random Llama checkpoint of some gigabytes, a tensor at a time.

Only printable ASCII can be sampled from it, so that two answers with the same text have
the same tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

VOCAB_SIZE = 258
HEAD_DIM = 64
EOS_ID = 256
PRINTABLE = slice(33, 127)
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
POOL_VALUES = (1 << 24) + 12289
"""Random values, repeated at other offsets in each tensor; a prime keeps rows apart."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large the model is; its heads are 64 wide, and eight of them share keys."""

    num_layers: int
    hidden_size: int
    intermediate_size: int

    @property
    def num_heads(self) -> int:
        return self.hidden_size // HEAD_DIM

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads // 8

    @property
    def largest_tensor_bytes(self) -> int:
        return 2 * self.hidden_size * max(self.intermediate_size, self.hidden_size)


FULL = Size(num_layers=9, hidden_size=4096, intermediate_size=16384)
QUICK = Size(num_layers=6, hidden_size=1024, intermediate_size=4096)


def write_model(folder: Path, size: Size) -> int:
    """Write config, tokenizer and bf16 weights; return the bytes of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_config(size)))
    _write_tokenizer(folder)
    shapes = dict(_shapes(size))
    return write_weights(folder / "model.safetensors", shapes)


def _config(size: Size) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "eos_token_id": EOS_ID,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "max_position_embeddings": 4096,
        "num_attention_heads": size.num_heads,
        "num_hidden_layers": size.num_layers,
        "num_key_value_heads": size.num_kv_heads,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": VOCAB_SIZE,
    }


def _shapes(size: Size) -> Iterator[tuple[str, Shape]]:
    d, f = size.hidden_size, size.intermediate_size
    kv = size.num_kv_heads * HEAD_DIM
    yield "model.embed_tokens.weight", (VOCAB_SIZE, d)
    for layer in range(size.num_layers):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", d), ("k", kv), ("v", kv), ("o", d)):
            yield f"{prefix}self_attn.{name}_proj.weight", (rows, d)
        yield f"{prefix}mlp.gate_proj.weight", (f, d)
        yield f"{prefix}mlp.up_proj.weight", (f, d)
        yield f"{prefix}mlp.down_proj.weight", (d, f)
        yield f"{prefix}input_layernorm.weight", (d,)
        yield f"{prefix}post_attention_layernorm.weight", (d,)
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (VOCAB_SIZE, d)


def write_weights(path: Path, shapes: dict[str, Shape]) -> int:
    """Write random bf16 tensors of these shapes as safetensors; return their bytes."""
    header: dict[str, object] = {}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    pool = np.random.default_rng(0).standard_normal(POOL_VALUES, dtype=np.float32)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for number, (name, shape) in enumerate(shapes.items()):
            file.write(_values(name, shape, pool, number).tobytes())
    return offset


def _values(
    name: str, shape: Shape, pool: npt.NDArray[np.float32], number: int
) -> npt.NDArray[np.generic]:
    if len(shape) == 1:
        return np.ones(shape, ml_dtypes.bfloat16)
    count = math.prod(shape)
    values = np.resize(np.roll(pool, 7919 * number), count).reshape(shape)
    values = values * np.float32(shape[1] ** -0.5 * (1.0 if "embed" in name else 2.0))
    if name == "lm_head.weight":
        values[: PRINTABLE.start] = 0
        values[PRINTABLE.stop :] = 0
    return values.astype(ml_dtypes.bfloat16)


def _write_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose id ``b`` is byte ``b``."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    vocabulary = {chr(byte): byte for byte in shown}
    vocabulary |= {chr(256 + number): byte for number, byte in enumerate(hidden)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True), AddedToken("<pad>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<end>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
