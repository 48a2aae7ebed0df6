"""Models of published shapes with random weights, as a checkpoint and as GGUF.

Speed depends on sizes alone, so both hold other random numbers of the same shapes. They
are kept in a folder that git ignores, since writing them takes longer than reading.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from benchmarks.large_model import write_weights
from pals.models.configs import read_config
from pals.models.snapshot import Snapshot

FOLDER = Path(__file__).parents[1] / "build" / "benchmarks"
"""Where models are kept between runs."""

CONTEXT = 8192
DRAWN_ROWS = 256
WEIGHTS_NAME = "model.safetensors"

GgufKind = Literal["BF16", "Q8_0"]

Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder with grouped-query attention and SwiGLU.

    Attributes:
        name: What lines call it; also a folder's name.
        family: As in config.json, and as llama.cpp calls the architecture.
        tied: Embedding and head are one matrix.
    """

    name: str
    family: Literal["llama", "qwen3"]
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors in the order of both files."""
        hidden, wide = self.hidden_size, self.intermediate_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        yield Tensor("model.embed_tokens", "token_embd", (self.vocab_size, hidden))
        for layer in range(self.num_layers):
            parts: list[tuple[str, str, Sizes]] = [
                ("input_layernorm", "attn_norm", (hidden,)),
                ("self_attn.q_proj", "attn_q", (queries, hidden)),
                ("self_attn.k_proj", "attn_k", (keys, hidden)),
                ("self_attn.v_proj", "attn_v", (keys, hidden)),
                ("self_attn.o_proj", "attn_output", (hidden, queries)),
                ("post_attention_layernorm", "ffn_norm", (hidden,)),
                ("mlp.gate_proj", "ffn_gate", (wide, hidden)),
                ("mlp.up_proj", "ffn_up", (wide, hidden)),
                ("mlp.down_proj", "ffn_down", (hidden, wide)),
            ]
            if self.family == "qwen3":
                parts += [
                    ("self_attn.q_norm", "attn_q_norm", (self.head_dim,)),
                    ("self_attn.k_norm", "attn_k_norm", (self.head_dim,)),
                ]
            for ours, theirs, sizes in parts:
                yield Tensor(f"model.layers.{layer}.{ours}", f"blk.{layer}.{theirs}", sizes)
        yield Tensor("model.norm", "output_norm", (hidden,))
        if not self.tied:
            yield Tensor("lm_head", "output", (self.vocab_size, hidden))

    def config(self) -> dict[str, object]:
        """Return the checkpoint's config.json."""
        return {
            "model_type": self.family,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-6,
            "rope_theta": 500000.0,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
        }


@dataclass(frozen=True, slots=True)
class Tensor:
    """A weight under its name in a checkpoint and in GGUF, without ``.weight``."""

    checkpoint_name: str
    gguf_name: str
    sizes: Sizes


LLAMA_8B = Shape(
    name="8b-4-layers",
    family="llama",
    num_layers=4,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=512,
    tied=False,
)
"""Four layers of Llama 3 8B; the vocabulary is small, so that its ends weigh nothing."""

QWEN3_600M = Shape(
    name="0.6b",
    family="qwen3",
    num_layers=28,
    hidden_size=1024,
    intermediate_size=3072,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=151936,
    tied=True,
)
"""Qwen3 0.6B, whole."""

SMOLLM2_135M = Shape(
    name="135m",
    family="llama",
    num_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    tied=True,
)
"""The demo's model."""

QUICK = Shape(
    name="quick",
    family="llama",
    num_layers=2,
    hidden_size=1024,
    intermediate_size=3072,
    num_heads=16,
    num_kv_heads=8,
    head_dim=64,
    vocab_size=512,
    tied=False,
)
"""Small enough for `--quick`."""


def open_checkpoint(shape: Shape) -> Snapshot:
    """Return a checkpoint of the shape, written when it is not there yet.

    Its manifest is of its config alone: hashing gigabytes would take longer than loading.
    """
    path = shape.folder / WEIGHTS_NAME
    config = json.dumps(shape.config())
    if not path.exists():
        shape.folder.mkdir(parents=True, exist_ok=True)
        (shape.folder / "config.json").write_text(config)
        partial = path.with_suffix(".partial")
        write_weights(partial, {f"{t.checkpoint_name}.weight": t.sizes for t in shape.tensors()})
        partial.rename(path)
    return Snapshot(
        path=shape.folder,
        model_id=f"random/{shape.name}",
        config=read_config(shape.config()),
        manifest=hashlib.sha256(config.encode()).digest(),
    )


def open_gguf(shape: Shape, kind: GgufKind) -> Path:
    """Return a GGUF file of the shape, written when it is not there yet."""
    path = shape.folder / f"{kind}.gguf"
    if not path.exists():
        shape.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        _write_gguf(partial, shape, kind)
        partial.rename(path)
    return path


def _write_gguf(path: Path, shape: Shape, kind: GgufKind) -> None:
    writer = GGUFWriter(path, shape.family)
    _describe(writer, shape)
    data = [_encode(tensor, kind) for tensor in shape.tensors()]
    for tensor, (array, stored_as) in zip(shape.tensors(), data, strict=True):
        writer.add_tensor(f"{tensor.gguf_name}.weight", array, raw_dtype=stored_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(shape.vocab_size)


def _encode(tensor: Tensor, kind: GgufKind) -> tuple[npt.NDArray[np.generic], GGMLQuantizationType]:
    """Return rows of random values that repeat, as GGUF holds them; norms are float32."""
    stored_as = GGMLQuantizationType[kind if len(tensor.sizes) > 1 else "F32"]
    if len(tensor.sizes) == 1:
        return np.ones(tensor.sizes, np.float32), stored_as
    columns = tensor.sizes[1]
    rows = min(tensor.sizes[0], DRAWN_ROWS)
    values = np.random.default_rng(0).standard_normal((rows, columns), dtype=np.float32)
    encoded = quantize(values * np.float32(columns**-0.5), stored_as)
    return np.resize(encoded, (tensor.sizes[0], encoded.shape[1])), stored_as
