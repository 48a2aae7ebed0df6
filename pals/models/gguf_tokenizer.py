"""Tokenizer files in the Hugging Face layout from the metadata of a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from pals.errors import UnsupportedModel
from pals.models.gguf_bpe import byte_level_tokenizer
from pals.models.gguf_reader import GgufHeader, Json
from pals.models.gguf_sentencepiece import sentencepiece_tokenizer
from pals.models.gguf_vocabulary import TokenType, Vocabulary, read_vocabulary, special_id

TOKENIZERS: Mapping[str, Callable[[GgufHeader, Vocabulary], dict[str, Json]]] = {
    "gpt2": byte_level_tokenizer,
    "llama": sentencepiece_tokenizer,
}
"""By ``tokenizer.ggml.model``."""

END_TOKENS = frozenset(
    {
        "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<EOT>",
        "<|endoftext|>", "<|end_of_text|>", "<|end_of_turn|>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
)  # fmt: skip
"""Control tokens that end an answer whatever their id: a GGUF file has no list of them,
and llama.cpp knows them by their text too (`llama-vocab.cpp`)."""


def tokenizer_files(header: GgufHeader) -> dict[str, bytes]:
    """Return the contents of the tokenizer's files by their names.

    They are tokenizer.json, tokenizer_config.json (with the chat template) and
    generation_config.json (with every token that ends an answer).

    Raises:
        UnsupportedModel: The vocabulary or its way to cut text is not implemented.
        CorruptModel: Tokens, types, merges, scores or special ids contradict each other.
    """
    model = header.text("tokenizer.ggml.model")
    if model not in TOKENIZERS:
        known = ", ".join(TOKENIZERS)
        problem = f"tokenizer `{model}`; implemented are {known}"
        raise UnsupportedModel(source=header.source, problem=problem)
    vocabulary = read_vocabulary(header)
    return {
        "tokenizer.json": _encode(TOKENIZERS[model](header, vocabulary)),
        "tokenizer_config.json": _encode(_tokenizer_config(header, vocabulary)),
        "generation_config.json": _encode(_generation_config(header, vocabulary)),
    }


def _tokenizer_config(header: GgufHeader, vocabulary: Vocabulary) -> dict[str, Json]:
    # transformers rebuilds the pre-tokenizer of the classes named after a model,
    # and keeps tokenizer.json as it is only for this one
    settings: dict[str, Json] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for role, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        index = special_id(header, role)
        if index is not None:
            settings[f"{name}_token"] = vocabulary.tokens[index]
    if "tokenizer.chat_template" in header.metadata:
        settings["chat_template"] = header.text("tokenizer.chat_template")
    return settings


def _generation_config(header: GgufHeader, vocabulary: Vocabulary) -> dict[str, Json]:
    bos, padding = special_id(header, "bos"), special_id(header, "padding")
    named = [special_id(header, role) for role in ("eos", "eot", "eom")]
    by_text = [
        index
        for index in vocabulary.of_type(TokenType.CONTROL)
        if vocabulary.tokens[index] in END_TOKENS and index != bos
    ]
    ends: list[Json] = [*dict.fromkeys(i for i in (*named, *by_text) if i is not None)]
    settings: dict[str, Json] = {"eos_token_id": ends[0] if len(ends) == 1 else ends}
    if bos is not None:
        settings["bos_token_id"] = bos
    if padding is not None:
        settings["pad_token_id"] = padding
    return settings


def _encode(value: dict[str, Json]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
