"""tokenizer.json for a byte-level BPE vocabulary (``tokenizer.ggml.model = gpt2``).

How text is cut before BPE stands nowhere in the file but as a name, ``tokenizer.ggml.pre``;
the table below gives the splits of those names as llama.cpp's `llama-vocab.cpp` and the
tokenizer.json files of the models define them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pals.errors import CorruptModel, UnsupportedModel
from pals.models.gguf_reader import GgufHeader, Json
from pals.models.gguf_vocabulary import TokenType, Vocabulary, added_tokens, post_processor

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CASED_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
)
_REST_WITH_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


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


_LLAMA3 = PreTokenizer(
    steps=_split(rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"), ignore_merges=True, add_bos=True
)
_QWEN2 = PreTokenizer(steps=_split(rf"{_WORDS}|\p{{N}}|{_REST}"), normalizer={"type": "NFC"})

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "gpt-2": PreTokenizer(steps=[_byte_level(use_regex=True)]),
    "smollm": PreTokenizer(
        steps=[{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)]
    ),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": PreTokenizer(
        steps=_split(rf"{_CASED_WORDS}|\p{{N}}|{_REST_WITH_SLASH}"),
        ignore_merges=True,
        add_bos=True,
    ),
}


def byte_level_tokenizer(header: GgufHeader, vocabulary: Vocabulary) -> dict[str, Json]:
    """Return the content of tokenizer.json.

    Raises:
        UnsupportedModel: The way to cut text is not implemented.
        CorruptModel: The merges do not fit the tokens.
    """
    name = header.text("tokenizer.ggml.pre", default="missing")
    pre = PRE_TOKENIZERS.get(name)
    if pre is None:
        known = ", ".join(PRE_TOKENIZERS)
        problem = f"pre-tokenizer `{name}` of the tokenizer `gpt2`; implemented are {known}"
        raise UnsupportedModel(source=header.source, problem=problem)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(vocabulary, TokenType.CONTROL),
        "normalizer": pre.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre.steps},
        "post_processor": post_processor(header, add_bos=pre.add_bos),
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
            "vocab": {**vocabulary.ids},
            "merges": _merges(header, vocabulary),
        },
    }


def _merges(header: GgufHeader, vocabulary: Vocabulary) -> list[Json]:
    known = set(vocabulary.tokens)
    merges: list[Json] = []
    for merge in header.strings("tokenizer.ggml.merges"):
        left, space, right = merge.partition(" ")
        if not space or not {left, right, left + right} <= known:
            problem = f"merge {merge[:40]!r} does not join two tokens into a third"
            raise CorruptModel(source=header.source, problem=problem)
        merges.append([left, right])
    return merges
