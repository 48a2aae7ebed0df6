"""Frozen values and ids that every part of Pals shares.

Nothing here imports a heavy package. Shape letters are those of the glossary in
docs/concepts.md: ``T`` query tokens, ``D`` hidden_size, ``V`` vocab_size.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Literal, NewType

from pals.errors import InvalidLayerRange

PeerId = NewType("PeerId", str)
"""A libp2p peer id in base58 (``12D3Koo…``)."""

SwarmId = NewType("SwarmId", bytes)
"""SHA-256 of the swarm's genesis record, 32 bytes."""

SessionId = NewType("SessionId", bytes)
"""One sequence's life over a chain, 16 random bytes."""

Buffer = bytes | bytearray | memoryview
"""Bytes that are read where they lie; a memoryview of them is of items of one byte."""

Dtype = Literal["bf16", "f32", "int8", "int4"]
"""In what a shard keeps its matrices; int8 and int4 compute in bf16, as all but f32 do."""

PrefillCodec = Literal["raw", "int8"]
"""How the hidden states of prompts are written on the wire."""

AttentionChoice = Literal["auto", "xla", "pallas"]
"""How a shard attends: in plain XLA, or by a kernel for its device, where there is one."""

ActivationDtype = Literal["bf16", "f32"]
"""In what hidden states are computed and travel."""


def activation_dtype(dtype: Dtype) -> ActivationDtype:
    """Return the dtype of a shard's hidden states."""
    return "f32" if dtype == "f32" else "bf16"


GroupSize = Literal[32, 64, 128]
"""Columns of an int4 matrix that share a scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How int8 and int4 shards quantise.

    Attributes:
        group_size: Of int4: smaller groups lose less and take more memory.
        activations: Let int8 round many rows to int8 where that is faster (CPU).
    """

    group_size: GroupSize = 128
    activations: bool = True


DEFAULT_QUANTIZATION = Quantization()


MAX_TOKENIZER_BYTES = 64 << 20
"""The most that tokenizer.json may have; the largest known ones have about 35 MB."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgt])(i?)b", re.IGNORECASE)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
_RANGE = re.compile(r"([0-9]{1,5}):([0-9]{1,5})")


@dataclass(frozen=True, slots=True, order=True)
class LayerRange:
    """The half-open range of decoder layers ``[start, stop)`` that one shard holds."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise InvalidLayerRange(text=f"{self.start}:{self.stop}")

    @classmethod
    def parse(cls, text: str) -> LayerRange:
        """Read ``"a:b"``.

        Raises:
            InvalidLayerRange: ``text`` is not two numbers with ``a < b``.
        """
        match = _RANGE.fullmatch(text)
        if match is None:
            raise InvalidLayerRange(text=text)
        return cls(int(match[1]), int(match[2]))

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"


def split_layers(num_layers: int, parts: int) -> list[LayerRange]:
    """Return ``parts`` ranges that cover ``[0, num_layers)`` in order, equal within one layer.

    Raises:
        InvalidLayerRange: There are fewer layers than parts.
    """
    bounds = [num_layers * i // parts for i in range(parts + 1)]
    return [LayerRange(start, stop) for start, stop in itertools.pairwise(bounds)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the tail turns logits into one token for one session.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it. Range 0 to 2.
        top_k: Most tokens to choose from; 0 for all.
        top_p: Smallest probability mass to sample from, in (0, 1].
        min_p: Least probability of a token to choose, as a part of the likeliest one's.
        repetition_penalty: Divides the positive logits of tokens of prompt and answer, and
            multiplies negative ones; 1 changes nothing.
        presence_penalty: Taken from the logit of each token that the answer has.
        frequency_penalty: Taken from it as many times as the answer has it.
        logit_bias: Token ids and what is added to their logits.
        seed: Start of the session's random stream, below 2**64. The token at a position
            depends on ``(seed, position)`` and the logits only, never on what else is in the
            batch.
        logprobs: How many likeliest tokens to name beside each token's own log-probability,
            0 to 20; None where nobody asks for either.
        pooling: Nothing is sampled: the mean of the prompt's last hidden states is wanted.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    logprobs: int | None = None
    pooling: bool = False


GrammarKind = Literal["json_object", "json_schema", "lark", "tokens"]

MAX_GRAMMAR_BYTES = 64 << 10
"""The most that the source of a grammar may have in UTF-8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What an answer may consist of.

    Attributes:
        kind: ``json_object`` is any JSON object; ``tokens`` prescribes how an answer begins.
        source: The JSON text of a schema; a grammar in llguidance's dialect of Lark; for
            ``tokens`` a JSON list of ids, after which the answer is free; for ``json_object``
            empty.
    """

    kind: GrammarKind
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What one shard reserves and compiles for.

    Attributes:
        max_sessions: Sessions that hold pages of the KV cache at one time.
        max_rows: Rows of one step, beside a chunk of a prompt.
        max_context_tokens: Tokens (prompt and answer) one session may reach.
        max_chunk_tokens: Tokens of one prefill step; a power of two.
        verify_tokens: Tokens of a row that verifies a draft; 1 where nothing is drafted.
        page_tokens: Tokens of a page of the KV cache: 16, 32 or 64.
        kv_bytes: Of the KV cache on each device; None for what the memory plan leaves.
        prefill_share: Of the time, for a long prompt, or each short one, while others decode.
    """

    max_sessions: int = 256
    max_rows: int = 64
    max_context_tokens: int = 131072
    max_chunk_tokens: int = 512
    verify_tokens: int = 1
    page_tokens: int = 64
    kv_bytes: int | None = None
    prefill_share: float = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSpec:
    """How one shard holds its layers, and for how much it makes room.

    Attributes:
        devices: Of this machine, over which each layer is spread.
        attention: How its layers attend.
    """

    dtype: Dtype = "bf16"
    limits: EngineLimits
    quantization: Quantization = DEFAULT_QUANTIZATION
    devices: int = 1
    attention: AttentionChoice = "auto"


def parse_bytes(text: str) -> int:
    """Read a size such as ``24GiB`` (1024s) or ``24GB`` (1000s).

    Raises:
        ValueError: It is none.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"`{text}` is no size; write one such as 24GiB, 24GB or 512MiB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[unit.lower()])


def short_id(value: str | bytes) -> str:
    """Return the 8-character form used in logs and tables."""
    return value.hex()[:8] if isinstance(value, bytes) else value[-8:]
