"""The vocabulary of a GGUF file: its tokens, their kinds and the special ones among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from pals.errors import CorruptModel
from pals.models.gguf_reader import GgufHeader, Json

MAX_TOKENS = 1 << 20

_SENTENCEPIECE_IDS: Mapping[str, int] = {"bos": 1, "eos": 2, "unknown": 0}
"""What llama.cpp assumes for ``tokenizer.ggml.model = llama`` when the key is missing."""


class TokenType(IntEnum):
    """Values of ``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Tokens by id, and their kinds."""

    tokens: list[str]
    types: list[int]

    def of_type(self, *kinds: TokenType) -> list[int]:
        """Return the ids of some kinds, ascending."""
        return [index for index, kind in enumerate(self.types) if kind in kinds]

    @property
    def ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}


def read_vocabulary(header: GgufHeader) -> Vocabulary:
    """Read and check the tokens.

    Raises:
        CorruptModel: There are none, too many, doubles, or types for other than all.
    """
    tokens = header.strings("tokenizer.ggml.tokens")
    if not 0 < len(tokens) <= MAX_TOKENS or len(set(tokens)) != len(tokens):
        problem = f"the vocabulary of {len(tokens)} tokens is too large, empty, or has doubles"
        raise CorruptModel(source=header.source, problem=problem)
    types = header.integers("tokenizer.ggml.token_type").tolist()
    if len(types) != len(tokens):
        problem = f"{len(types)} token types for {len(tokens)} tokens"
        raise CorruptModel(source=header.source, problem=problem)
    return Vocabulary(tokens=tokens, types=types)


def special_id(header: GgufHeader, role: str) -> int | None:
    """Return the id of ``bos``, ``eos``, ``eot``, ``eom``, ``unknown`` or ``padding``, if any."""
    key = f"tokenizer.ggml.{role}_token_id"
    size = len(header.strings("tokenizer.ggml.tokens"))
    if key in header.metadata:
        return header.integer(key, maximum=size - 1)
    if header.text("tokenizer.ggml.model") != "llama":
        return None
    usual = _SENTENCEPIECE_IDS.get(role)
    return usual if usual is not None and usual < size else None


def added_tokens(vocabulary: Vocabulary, *special: TokenType) -> list[Json]:
    """Return ``added_tokens`` of tokenizer.json: tokens that are cut out of a text whole."""
    return [
        {
            "id": index,
            "content": vocabulary.tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": vocabulary.types[index] in special,
        }
        for index in vocabulary.of_type(*special, TokenType.USER_DEFINED)
        if vocabulary.tokens[index]
    ]


def post_processor(header: GgufHeader, *, add_bos: bool) -> dict[str, Json] | None:
    """Return what puts BOS before a text and EOS behind it, as the file asks for.

    ``add_bos`` is what llama.cpp does when the file does not say.
    """
    tokens = header.strings("tokenizer.ggml.tokens")
    wanted = {
        "bos": header.flag("tokenizer.ggml.add_bos_token", default=add_bos),
        "eos": header.flag("tokenizer.ggml.add_eos_token", default=False),
    }
    ids = {role: special_id(header, role) for role, flag in wanted.items() if flag}
    found = {role: index for role, index in ids.items() if index is not None}
    if not found:
        return None
    pieces: dict[str, list[Json]] = {"bos": [], "eos": []}
    for role, index in found.items():
        pieces[role] = [{"SpecialToken": {"id": tokens[index], "type_id": 0}}]
    first: Json = {"Sequence": {"id": "A", "type_id": 0}}
    second: Json = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [*pieces["bos"], first, *pieces["eos"]],
        "pair": [*pieces["bos"], first, second, *pieces["eos"]],
        "special_tokens": {
            tokens[index]: {"id": tokens[index], "ids": [index], "tokens": [tokens[index]]}
            for index in found.values()
        },
    }
