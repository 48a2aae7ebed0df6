"""Decide what the import of a GGUF file will write, before a byte of it is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from pals.errors import CorruptModel, UnsupportedModel
from pals.models.gguf_families import (
    ARCHITECTURES,
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    MAX_EXPERTS,
    MAX_WIDTH,
    ROUTER,
    Architecture,
    Row,
    Sizes,
)
from pals.models.gguf_reader import GgufHeader, GgufTensor, Json
from pals.models.gguf_rope import MAX_CONTEXT, ROPE_FACTORS, as_written, rope_scaling
from pals.models.gguf_tokenizer import special_id, tokenizer_files

MAX_LAYERS = 1024
MAX_HEADS = 1 << 12

_COMMON_KEYS = frozenset(
    {
        "attention.head_count", "attention.head_count_kv", "attention.key_length",
        "attention.layer_norm_rms_epsilon", "attention.value_length", "block_count",
        "context_length", "embedding_length", "feed_forward_length", "rope.dimension_count",
        "rope.freq_base", "rope.scaling.factor", "rope.scaling.original_context_length",
        "rope.scaling.type", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_ext_factor",
    }
)  # fmt: skip
_INERT_KEYS = frozenset({"rope.scaling.finetuned", "tensor_data_layout", "vocab_size"})
_NEUTRAL: Mapping[str, Json] = {"attention.causal": True}
"""What a setting that is not implemented may be; of every other only 0 and false."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """One tensor of the output.

    Attributes:
        name: Its Hugging Face name.
        source: Where it lies; for one of many stacked experts, that expert's part.
        rotary_head_dim: Rows of a head whose rotary pairs are interleaved, or None.
        offset: What the source holds too much: to be taken off each value.
        keeps_float32: Written as float32, not as bf16.
    """

    name: str
    source: GgufTensor
    rotary_head_dim: int | None = None
    offset: float = 0.0
    keeps_float32: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportPlan:
    """The parts of the output folder; ``tokenizer`` maps file names to contents."""

    config: Mapping[str, Json]
    tokenizer: Mapping[str, bytes]
    tensors: list[PlannedTensor]


def plan_import(header: GgufHeader) -> ImportPlan:
    """Check that the whole model is there and of a kind that runs.

    Raises:
        CorruptModel: A tensor is missing or has another shape than the metadata says.
        UnsupportedModel: The architecture, an option or a tensor is not implemented.
    """
    architecture = _architecture(header)
    sizes = _sizes(header)
    return ImportPlan(
        config=_config(header, architecture, sizes),
        tokenizer=tokenizer_files(header),
        tensors=_plan_tensors(header, architecture, sizes),
    )


def _architecture(header: GgufHeader) -> Architecture:
    name = header.text("general.architecture")
    found = ARCHITECTURES.get(name)
    if found is None:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedModel(
            source=header.source, problem=f"GGUF architecture `{name}`, not one of {known}"
        )
    if header.integer("split.count", maximum=1 << 16, default=1) > 1:
        problem = "one of several files: join them first with `llama-gguf-split --merge`"
        raise UnsupportedModel(source=header.source, problem=problem)
    _check_keys(header, name, found)
    return found


def _check_keys(header: GgufHeader, name: str, architecture: Architecture) -> None:
    """Refuse a setting of the model that nothing here reads: it may change its answers."""
    known = _COMMON_KEYS | _INERT_KEYS | architecture.keys
    for key, value in header.metadata.items():
        prefix, _, rest = key.partition(".")
        is_array = isinstance(value, np.ndarray | list)
        if prefix != name or rest in known or (not is_array and value == _NEUTRAL.get(rest, False)):
            continue
        problem = f"`{key}` is `{str(value)[:40]}`, which is not implemented"
        raise UnsupportedModel(source=header.source, problem=problem)


# --- sizes and config ----------------------------------------------------------------


def _sizes(header: GgufHeader) -> dict[str, int]:
    """Read every size, by its letter in `Row.shape`."""
    name = header.text("general.architecture")

    def positive(key: str, maximum: int, default: int | None = None) -> int:
        return header.positive(f"{name}.{key}", maximum=maximum, default=default)

    hidden = positive("embedding_length", MAX_WIDTH)
    heads = positive("attention.head_count", MAX_HEADS)
    kv_heads = positive("attention.head_count_kv", MAX_HEADS, heads)
    head_dim = _head_dim(header, name, hidden // heads)
    sizes = {
        "D": hidden,
        "F": positive("feed_forward_length", MAX_WIDTH),
        "H": head_dim,
        "K": kv_heads * head_dim,
        "L": positive("block_count", MAX_LAYERS),
        "N": heads,
        "Q": heads * head_dim,
        "V": len(header.strings("tokenizer.ggml.tokens")),
    }
    if "expert_feed_forward_length" in ARCHITECTURES[name].keys:
        sizes["E"] = positive("expert_count", MAX_EXPERTS)
        sizes["M"] = positive("expert_feed_forward_length", MAX_WIDTH)
    return sizes


def _head_dim(header: GgufHeader, name: str, usual: int) -> int:
    keys = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    given = {
        key: header.positive(key, maximum=MAX_WIDTH)
        for key in (f"{name}.{key}" for key in keys)
        if key in header.metadata
    }
    if len(set(given.values())) > 1:
        problem = (
            f"the widths of a head differ: {', '.join(f'`{k}` {v}' for k, v in given.items())}"
        )
        raise UnsupportedModel(source=header.source, problem=problem)
    head_dim = next(iter(given.values()), max(usual, 1))
    if head_dim % 2:
        problem = f"a head is {head_dim} wide, which does not divide into rotary pairs"
        raise CorruptModel(source=header.source, problem=problem)
    return head_dim


def _config(header: GgufHeader, architecture: Architecture, sizes: Sizes) -> dict[str, Json]:
    """Build config.json with the keys of the family's class in transformers."""
    name = header.text("general.architecture")
    theta = as_written(header.number(f"{name}.rope.freq_base", default=10_000.0))
    config: dict[str, Json] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "head_dim": sizes["H"],
        architecture.activation_key: architecture.activation,
        "hidden_size": sizes["D"],
        "intermediate_size": sizes["F"],
        "max_position_embeddings": header.positive(f"{name}.context_length", maximum=MAX_CONTEXT),
        "num_attention_heads": sizes["N"],
        "num_hidden_layers": sizes["L"],
        "num_key_value_heads": sizes["K"] // sizes["H"],
        "rms_norm_eps": as_written(header.number(f"{name}.attention.layer_norm_rms_epsilon")),
        "rope_scaling": rope_scaling(header, name, head_dim=sizes["H"], theta=theta),
        "rope_theta": theta,
        "tie_word_embeddings": HEAD.ours not in header.tensors,
        "torch_dtype": "bfloat16",
        "vocab_size": sizes["V"],
        **architecture.config(header, sizes),
        **_switches(header, architecture),
    }
    for role in ("bos", "eos"):
        config[f"{role}_token_id"] = special_id(header, role)
    return config


def _switches(header: GgufHeader, architecture: Architecture) -> dict[str, bool]:
    return {
        switch: f"blk.0.{tensor}" in header.tensors
        for switch, tensor in architecture.switches.items()
    }


# --- tensors -------------------------------------------------------------------------


def _plan_tensors(
    header: GgufHeader, architecture: Architecture, sizes: Sizes
) -> list[PlannedTensor]:
    rows = list(_rows(header, architecture, sizes["L"]))
    wanted = {row.ours for row in rows}
    extra = sorted(header.tensors.keys() - wanted - {ROPE_FACTORS})
    if extra:
        problem = (
            f"{len(extra)} tensors have no place in a {architecture.model_type} model, "
            f"`{extra[0]}` first"
        )
        raise UnsupportedModel(source=header.source, problem=problem)
    missing = sorted(wanted - header.tensors.keys())
    if missing:
        problem = f"{len(missing)} tensors are missing, `{missing[0]}` first"
        raise CorruptModel(source=header.source, problem=problem)
    return [planned for row in rows for planned in _planned(header, architecture, sizes, row)]


def _rows(header: GgufHeader, architecture: Architecture, num_layers: int) -> Iterator[Row]:
    """Yield every tensor that the file must hold, with full names."""
    switches = _switches(header, architecture)
    yield EMBEDDING
    for layer in range(num_layers):
        for row in architecture.layer:
            if row.optional is None or switches[row.optional]:
                ours, theirs = f"blk.{layer}.{row.ours}", f"model.layers.{layer}.{row.theirs}"
                yield Row(ours, theirs, row.shape)
    yield FINAL_NORM
    if HEAD.ours in header.tensors:
        yield HEAD


def _planned(
    header: GgufHeader, architecture: Architecture, sizes: Sizes, row: Row
) -> Iterator[PlannedTensor]:
    """Yield the output of one tensor: one, or one for each expert."""
    tensor = header.tensors[row.ours]
    shape = tuple(sizes[letter] for letter in row.shape)
    if tensor.shape != shape:
        problem = f"tensor `{row.ours}` has the shape {tensor.shape}, expected {shape}"
        raise CorruptModel(source=header.source, problem=problem)
    rotary = architecture.interleaved and row.shape[0] in "QK" and "attn_v" not in row.ours
    whole = PlannedTensor(
        name=row.theirs,
        source=tensor,
        rotary_head_dim=sizes["H"] if rotary else None,
        offset=architecture.norm_offset if row.theirs.endswith("norm.weight") else 0.0,
        # norms and biases are small, and the router decides between near ties
        keeps_float32=len(shape) == 1 or row.ours.endswith(ROUTER),
    )
    if "{e}" in row.theirs:
        yield from _experts(whole)
    else:
        yield whole


def _experts(stacked: PlannedTensor) -> Iterator[PlannedTensor]:
    source = stacked.source
    experts, *shape = source.shape
    size = source.size_bytes // experts
    for expert in range(experts):
        part = replace(
            source, shape=tuple(shape), offset=source.offset + expert * size, size_bytes=size
        )
        yield replace(stacked, name=stacked.name.replace("{e}", str(expert)), source=part)
