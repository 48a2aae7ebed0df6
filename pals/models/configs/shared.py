"""Readings that several families share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from pals.models.config import Activation
from pals.models.configs.reader import (
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_HIDDEN_SIZE,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB_SIZE,
    ConfigReader,
)

SLIDING, FULL = "sliding_attention", "full_attention"

ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class CommonFields(TypedDict):
    """The arguments of `ModelConfig` that every family reads alike."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]


def read_common(
    reader: ConfigReader,
    *,
    positions: int,
    eps: float = 1e-6,
    tied: bool = False,
) -> CommonFields:
    """Read the sizes and switches that every family has.

    Args:
        reader: Of config.json.
        positions: The family's default of ``max_position_embeddings``.
        eps: The family's default of ``rms_norm_eps``.
        tied: The family's default of ``tie_word_embeddings``.
    """
    vocab_size = reader.integer("vocab_size", MAX_VOCAB_SIZE)
    return CommonFields(
        vocab_size=vocab_size,
        hidden_size=reader.integer("hidden_size", MAX_HIDDEN_SIZE),
        num_layers=reader.integer("num_hidden_layers", MAX_LAYERS),
        max_position_embeddings=reader.integer(
            "max_position_embeddings", MAX_POSITIONS, default=positions
        ),
        rms_norm_eps=reader.number("rms_norm_eps", default=eps),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", default=tied),
        eos_token_ids=reader.token_ids("eos_token_id", vocab_size),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """The heads of grouped-query attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


def read_heads(reader: ConfigReader, hidden_size: int, *, head_dim: int | None = None) -> Heads:
    """Read the number and width of the heads.

    Args:
        reader: Of config.json.
        hidden_size: Divided by the heads where nothing names their width.
        head_dim: The family's own default width.
    """
    num_heads = reader.integer("num_attention_heads", MAX_HEADS)
    num_kv_heads = reader.integer("num_key_value_heads", MAX_HEADS, default=num_heads)
    if num_heads % num_kv_heads:
        raise reader.corrupt(f"{num_heads} heads do not divide among {num_kv_heads} kv heads")
    default = hidden_size // num_heads if head_dim is None else head_dim
    return Heads(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=reader.integer("head_dim", MAX_HEAD_DIM, default=default),
    )


def read_layer_types(reader: ConfigReader, num_layers: int, default: list[bool]) -> list[bool]:
    """Return for each layer whether its attention slides, by ``layer_types``.

    Args:
        reader: Of config.json.
        num_layers: Layers of the model.
        default: Where config.json does not say.
    """
    kinds = reader.strings("layer_types")
    if kinds is None:
        return default
    unknown = sorted(set(kinds) - {SLIDING, FULL})
    if unknown:
        raise reader.unsupported(f"attention of type {unknown[0][:40]!r}")
    if len(kinds) != num_layers:
        raise reader.corrupt(f"`layer_types` has {len(kinds)} entries for {num_layers} layers")
    return [kind == SLIDING for kind in kinds]
