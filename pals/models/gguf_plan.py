"""Decide what the import of a GGUF file will write, before a byte of it is written.

The llama family only: https://github.com/ggml-org/llama.cpp (`convert_hf_to_gguf.py`
and `gguf-py/gguf/tensor_mapping.py`) name the tensors and metadata keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from pals.errors import CorruptModel, UnsupportedModel
from pals.models.gguf_reader import GgufHeader, GgufTensor
from pals.models.gguf_tokenizer import Json, special_id, tokenizer_files

MAX_LAYERS = 1024
MAX_HEADS = 1 << 12
MAX_WIDTH = 1 << 20
MAX_CONTEXT = 1 << 30

EMBEDDING, HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """One tensor of the output.

    Attributes:
        name: Its Hugging Face name.
        heads: Number of heads whose rotary rows are interleaved in the source, or None.
    """

    name: str
    source: GgufTensor
    heads: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportPlan:
    """The parts of the output folder; ``tokenizer`` maps file names to contents."""

    config: Mapping[str, Json]
    tokenizer: Mapping[str, bytes]
    tensors: list[PlannedTensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """The sizes that fix every tensor's shape; letters are those of the glossary."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


def plan_import(header: GgufHeader) -> ImportPlan:
    """Check that the whole model is there and of a kind that runs.

    Raises:
        CorruptModel: A tensor is missing or has another shape than the metadata says.
        UnsupportedModel: The architecture, an option or a tensor is not implemented.
    """
    _check_family(header)
    sizes = _sizes(header)
    return ImportPlan(
        config=_config(header, sizes),
        tokenizer=tokenizer_files(header),
        tensors=_plan_tensors(header, sizes),
    )


def _check_family(header: GgufHeader) -> None:
    architecture = header.text("general.architecture")
    if architecture != "llama":
        raise UnsupportedModel(
            source=header.source, problem=f"GGUF architecture `{architecture}`, not `llama`"
        )
    for key, neutral in (("llama.expert_count", 0), ("llama.rope.scaling.type", "none")):
        value = header.metadata.get(key, neutral)
        if value != neutral:
            raise UnsupportedModel(source=header.source, problem=f"`{key}` is `{value}`")


def _sizes(header: GgufHeader) -> _Sizes:
    hidden = header.positive("llama.embedding_length", maximum=MAX_WIDTH)
    heads = header.positive("llama.attention.head_count", maximum=MAX_HEADS)
    head_dim = header.positive(
        "llama.rope.dimension_count", maximum=MAX_WIDTH, default=max(hidden // heads, 1)
    )
    for key in ("llama.attention.key_length", "llama.attention.value_length"):
        if header.positive(key, maximum=MAX_WIDTH, default=head_dim) != head_dim:
            raise UnsupportedModel(
                source=header.source, problem=f"`{key}` differs from the rotary width {head_dim}"
            )
    return _Sizes(
        layers=header.positive("llama.block_count", maximum=MAX_LAYERS),
        hidden=hidden,
        intermediate=header.positive("llama.feed_forward_length", maximum=MAX_WIDTH),
        heads=heads,
        kv_heads=header.positive("llama.attention.head_count_kv", maximum=MAX_HEADS, default=heads),
        head_dim=head_dim,
        vocab=len(header.strings("tokenizer.ggml.tokens")),
    )


def _config(header: GgufHeader, sizes: _Sizes) -> dict[str, Json]:
    """Build config.json with the keys of `transformers.LlamaConfig`."""
    epsilon = header.number("llama.attention.layer_norm_rms_epsilon")
    tokens = header.strings("tokenizer.ggml.tokens")
    config: dict[str, Json] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "max_position_embeddings": header.positive("llama.context_length", maximum=MAX_CONTEXT),
        "mlp_bias": False,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        # the file holds a float32: its shortest form is what the model's author wrote
        "rms_norm_eps": float(str(np.float32(epsilon))),
        "rope_scaling": None,
        "rope_theta": header.number("llama.rope.freq_base", default=10_000.0),
        "tie_word_embeddings": HEAD not in header.tensors,
        "torch_dtype": "bfloat16",
        "vocab_size": sizes.vocab,
    }
    for role in ("bos", "eos"):
        config[f"{role}_token_id"] = special_id(header, role, tokens)
    return config


def _plan_tensors(header: GgufHeader, sizes: _Sizes) -> list[PlannedTensor]:
    rows = list(_tensor_table(sizes, has_head=HEAD in header.tensors))
    wanted = {source for source, *_ in rows}
    extra = sorted(header.tensors.keys() - wanted)
    if extra:
        problem = f"{len(extra)} tensors have no place in a llama model, `{extra[0]}` first"
        raise UnsupportedModel(source=header.source, problem=problem)
    missing = sorted(wanted - header.tensors.keys())
    if missing:
        problem = f"{len(missing)} tensors are missing, `{missing[0]}` first"
        raise CorruptModel(source=header.source, problem=problem)
    planned: list[PlannedTensor] = []
    for source, name, shape, heads in rows:
        tensor = header.tensors[source]
        if tensor.shape != shape:
            problem = f"tensor `{source}` has the shape {tensor.shape}, expected {shape}"
            raise CorruptModel(source=header.source, problem=problem)
        planned.append(PlannedTensor(name=name, source=tensor, heads=heads))
    return planned


def _tensor_table(
    sizes: _Sizes, *, has_head: bool
) -> Iterator[tuple[str, str, tuple[int, ...], int | None]]:
    """Yield (GGUF name, Hugging Face name, shape, interleaved heads) for every tensor."""
    d, f = sizes.hidden, sizes.intermediate
    q, kv = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    yield EMBEDDING, "model.embed_tokens.weight", (sizes.vocab, d), None
    for i in range(sizes.layers):
        ours, theirs = f"blk.{i}.", f"model.layers.{i}."
        yield f"{ours}attn_norm.weight", f"{theirs}input_layernorm.weight", (d,), None
        yield f"{ours}attn_q.weight", f"{theirs}self_attn.q_proj.weight", (q, d), sizes.heads
        yield f"{ours}attn_k.weight", f"{theirs}self_attn.k_proj.weight", (kv, d), sizes.kv_heads
        yield f"{ours}attn_v.weight", f"{theirs}self_attn.v_proj.weight", (kv, d), None
        yield f"{ours}attn_output.weight", f"{theirs}self_attn.o_proj.weight", (d, q), None
        yield f"{ours}ffn_norm.weight", f"{theirs}post_attention_layernorm.weight", (d,), None
        yield f"{ours}ffn_gate.weight", f"{theirs}mlp.gate_proj.weight", (f, d), None
        yield f"{ours}ffn_up.weight", f"{theirs}mlp.up_proj.weight", (f, d), None
        yield f"{ours}ffn_down.weight", f"{theirs}mlp.down_proj.weight", (d, f), None
    yield "output_norm.weight", "model.norm.weight", (d,), None
    if has_head:
        yield HEAD, "lm_head.weight", (sizes.vocab, d), None
