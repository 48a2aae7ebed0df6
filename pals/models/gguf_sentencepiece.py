"""tokenizer.json for a SentencePiece vocabulary (``tokenizer.ggml.model = llama``).

Llama 2, Mistral and Gemma. SentencePiece's BPE joins, again and again, the two neighbours
whose union has the highest score, the leftmost of equal ones; a character that is no token
becomes its UTF-8 bytes. The `tokenizers` library does the same given each pair's rank, so
that the merges are every way to split a token into two, in the order of the scores.
"""

from __future__ import annotations

import numpy as np

from pals.errors import CorruptModel, UnsupportedModel
from pals.models.gguf_reader import GgufHeader, Json
from pals.models.gguf_vocabulary import (
    TokenType,
    Vocabulary,
    added_tokens,
    post_processor,
    special_id,
)

METASPACE = "▁"

MAX_CHARACTERS = 4 << 20
"""Of all tokens together; 262,144 tokens of Gemma have 2 million."""


def sentencepiece_tokenizer(header: GgufHeader, vocabulary: Vocabulary) -> dict[str, Json]:
    """Return the content of tokenizer.json.

    Raises:
        CorruptModel: Scores are missing, or other than one number for each token.
        UnsupportedModel: The text would have to be normalised.
    """
    if header.flag("tokenizer.ggml.remove_extra_whitespaces", default=False):
        problem = "`tokenizer.ggml.remove_extra_whitespaces` is not implemented"
        raise UnsupportedModel(source=header.source, problem=problem)
    unknown = special_id(header, "unknown")
    add_space = header.flag("tokenizer.ggml.add_space_prefix", default=True)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(vocabulary, TokenType.CONTROL, TokenType.UNKNOWN),
        "normalizer": _normalizer(add_space=add_space),
        "pre_tokenizer": None,
        "post_processor": post_processor(header, add_bos=True),
        "decoder": _decoder(strip_space=add_space),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if unknown is None else vocabulary.tokens[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": len(vocabulary.of_type(TokenType.BYTE)) == 256,
            "ignore_merges": False,
            "vocab": {**vocabulary.ids},
            "merges": [list(pair) for pair in merges(vocabulary, _scores(header, vocabulary))],
        },
    }


def _normalizer(*, add_space: bool) -> dict[str, Json]:
    replace: dict[str, Json] = {
        "type": "Replace",
        "pattern": {"String": " "},
        "content": METASPACE,
    }
    if not add_space:
        return replace
    # as in llama.cpp, also the text behind a special token begins with a space
    prepend: dict[str, Json] = {"type": "Prepend", "prepend": METASPACE}
    return {"type": "Sequence", "normalizers": [prepend, replace]}


def _decoder(*, strip_space: bool) -> dict[str, Json]:
    steps: list[Json] = [
        {"type": "Replace", "pattern": {"String": METASPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if strip_space:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _scores(header: GgufHeader, vocabulary: Vocabulary) -> list[float]:
    scores = header.metadata.get("tokenizer.ggml.scores")
    if (
        not isinstance(scores, np.ndarray)
        or scores.dtype.kind != "f"
        or len(scores) != len(vocabulary.tokens)
        or np.isnan(scores).any()
    ):
        problem = "`tokenizer.ggml.scores` does not hold one number for each token"
        raise CorruptModel(source=header.source, problem=problem)
    if sum(map(len, vocabulary.tokens)) > MAX_CHARACTERS:
        problem = f"the vocabulary has more than {MAX_CHARACTERS} characters"
        raise CorruptModel(source=header.source, problem=problem)
    return scores.astype(np.float64).tolist()


def merges(vocabulary: Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """Return every pair of normal tokens whose union is one, first those joined first.

    Equal scores (converters that know none write -1000 everywhere) fall back on the id:
    SentencePiece numbers tokens in the order of their merges.

    Where a token T is met twice with a shared part, ``xyz`` with ``xy`` = ``yz`` = T,
    SentencePiece joins the left one. There ``z`` begins T, so that of the splits of T
    those whose right part begins T come first.
    """
    tokens = vocabulary.tokens
    normal = {tokens[index] for index in vocabulary.of_type(TokenType.NORMAL)}
    joined = [i for i in vocabulary.of_type(TokenType.NORMAL) if len(tokens[i]) > 1]
    found: list[tuple[str, str]] = []
    for index in sorted(joined, key=lambda i: (-scores[i], i)):
        token = tokens[index]
        pairs = [
            (token[:cut], token[cut:])
            for cut in range(len(token) - 1, 0, -1)
            if token[:cut] in normal and token[cut:] in normal
        ]
        found.extend(sorted(pairs, key=lambda pair: not token.startswith(pair[1])))
    return found
