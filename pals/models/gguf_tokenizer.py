"""Tokenizer files in the Hugging Face layout from the metadata of a GGUF file.

Only byte-level BPE vocabularies (``tokenizer.ggml.model = gpt2``). How text is cut
before BPE stands nowhere in the file but as a name, ``tokenizer.ggml.pre``; the table
below gives the splits of those names as llama.cpp's `llama-vocab.cpp` defines them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from pals.errors import CorruptModel, UnsupportedModel
from pals.models.gguf_reader import GgufHeader

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]

MAX_TOKENS = 1 << 20
_CONTROL, _USER_DEFINED = 3, 4

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level(*, use_regex: bool) -> dict[str, Json]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _split(pattern: str) -> list[Json]:
    split: dict[str, Json] = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return [split, _byte_level(use_regex=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizer:
    """How one named vocabulary cuts text, and whether it puts BOS first by default."""

    steps: list[Json]
    ignore_merges: bool = False
    add_bos: bool = False
    normalizer: dict[str, Json] | None = None


PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "gpt-2": PreTokenizer(steps=[_byte_level(use_regex=True)]),
    "smollm": PreTokenizer(
        steps=[{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)]
    ),
    "llama-bpe": PreTokenizer(
        steps=_split(rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"), ignore_merges=True, add_bos=True
    ),
    "qwen2": PreTokenizer(steps=_split(rf"{_WORDS}|\p{{N}}|{_REST}"), normalizer={"type": "NFC"}),
}


def tokenizer_files(header: GgufHeader) -> dict[str, bytes]:
    """Return the contents of the tokenizer's files by their names.

    They are tokenizer.json, tokenizer_config.json (with the chat template) and
    generation_config.json (with every token that ends an answer).

    Raises:
        UnsupportedModel: The vocabulary or its way to cut text is not implemented.
        CorruptModel: Tokens, types, merges or special ids contradict each other.
    """
    vocabulary = header.text("tokenizer.ggml.model")
    name = header.text("tokenizer.ggml.pre", default="missing")
    if vocabulary != "gpt2" or name not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise UnsupportedModel(
            source=header.source,
            problem=f"tokenizer `{vocabulary}` with pre-tokenizer `{name}`; "
            f"implemented are `gpt2` with one of {known}",
        )
    tokens = _tokens(header)
    pre = PRE_TOKENIZERS[name]
    return {
        "tokenizer.json": _encode(_tokenizer(header, tokens, pre)),
        "tokenizer_config.json": _encode(_tokenizer_config(header, tokens)),
        "generation_config.json": _encode(_generation_config(header, tokens)),
    }


def special_id(header: GgufHeader, role: str, tokens: list[str]) -> int | None:
    """Return the id of ``bos``, ``eos``, ``eot``, ``unknown`` or ``padding``, if any."""
    key = f"tokenizer.ggml.{role}_token_id"
    return header.integer(key, maximum=len(tokens) - 1) if key in header.metadata else None


def _tokens(header: GgufHeader) -> list[str]:
    tokens = header.strings("tokenizer.ggml.tokens")
    if not 0 < len(tokens) <= MAX_TOKENS or len(set(tokens)) != len(tokens):
        problem = f"the vocabulary of {len(tokens)} tokens is too large, empty, or has doubles"
        raise CorruptModel(source=header.source, problem=problem)
    return tokens


def _tokenizer(header: GgufHeader, tokens: list[str], pre: PreTokenizer) -> dict[str, Json]:
    """Build tokenizer.json."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(header, tokens),
        "normalizer": pre.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre.steps},
        "post_processor": _post_processor(header, tokens, pre),
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.ignore_merges,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": _merges(header, tokens),
        },
    }


def _added_tokens(header: GgufHeader, tokens: list[str]) -> list[Json]:
    types = header.integers("tokenizer.ggml.token_type")
    if len(types) != len(tokens):
        problem = f"{len(types)} token types for {len(tokens)} tokens"
        raise CorruptModel(source=header.source, problem=problem)
    return [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for index, kind in enumerate(types.tolist())
        if kind in (_CONTROL, _USER_DEFINED)
    ]


def _merges(header: GgufHeader, tokens: list[str]) -> list[Json]:
    known = set(tokens)
    merges: list[Json] = []
    for merge in header.strings("tokenizer.ggml.merges"):
        left, space, right = merge.partition(" ")
        if not space or not {left, right, left + right} <= known:
            problem = f"merge {merge[:40]!r} does not join two tokens into a third"
            raise CorruptModel(source=header.source, problem=problem)
        merges.append([left, right])
    return merges


def _post_processor(
    header: GgufHeader, tokens: list[str], pre: PreTokenizer
) -> dict[str, Json] | None:
    bos = special_id(header, "bos", tokens)
    if bos is None or not header.flag("tokenizer.ggml.add_bos_token", default=pre.add_bos):
        return None
    token = tokens[bos]
    first: dict[str, Json] = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            first,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {token: {"id": token, "ids": [bos], "tokens": [token]}},
    }


def _tokenizer_config(header: GgufHeader, tokens: list[str]) -> dict[str, Json]:
    # transformers rebuilds the pre-tokenizer of the classes named after a model,
    # and keeps tokenizer.json as it is only for this one
    settings: dict[str, Json] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for role, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        index = special_id(header, role, tokens)
        if index is not None:
            settings[f"{name}_token"] = tokens[index]
    if "tokenizer.chat_template" in header.metadata:
        settings["chat_template"] = header.text("tokenizer.chat_template")
    return settings


def _generation_config(header: GgufHeader, tokens: list[str]) -> dict[str, Json]:
    roles = {role: special_id(header, role, tokens) for role in ("bos", "eos", "eot", "padding")}
    ends: list[Json] = []
    for index in (roles["eos"], roles["eot"]):
        if index is not None and index not in ends:
            ends.append(index)
    settings: dict[str, Json] = {"eos_token_id": ends[0] if len(ends) == 1 else ends}
    if roles["bos"] is not None:
        settings["bos_token_id"] = roles["bos"]
    if roles["padding"] is not None:
        settings["pad_token_id"] = roles["padding"]
    return settings


def _encode(value: dict[str, Json]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
