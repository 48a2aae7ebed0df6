"""Check tokenizer.json, and make of it the part that decodes and runs no pattern.

The library decodes by the vocabulary and the decoder alone. What is left out here (merges,
normalizer, pre-tokenizer, post-processor) is what a hostile tokenizer.json attacks with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import msgspec
import tokenizers

from pals.errors import CorruptModel

MAX_TOKEN_CHARACTERS = 1 << 16
MAX_DECODERS = 16
MAX_REPLACEMENT_CHARACTERS = 64
MAX_PATTERN_CHARACTERS = 1 << 14
"""Of all regular expressions together: compiling 240,000 took 20 s and 1.7 GB."""

_PLAIN_DECODERS = frozenset(
    {"BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "Strip", "WordPiece"}
)


class _TokenizerFile(msgspec.Struct):
    model: dict[str, msgspec.Raw]
    added_tokens: msgspec.Raw = msgspec.Raw(b"[]")
    decoder: object = None
    normalizer: object = None
    pre_tokenizer: object = None


def load_decoder(text: str, path: Path) -> tokenizers.Tokenizer:
    """Return a tokenizer that decodes as the one of ``text`` does, and has no pattern.

    Args:
        text: Content of tokenizer.json.
        path: Named in errors.

    Raises:
        CorruptModel: It makes no tokenizer, a token is too long, its regular expressions
            are, or its decoder is one whose time or size nothing bounds.
    """
    reduced = _reduce(text, path)
    try:
        inner = tokenizers.Tokenizer.from_str(reduced)
        longest = max(map(len, inner.get_vocab()), default=0)
    except Exception as error:
        problem = f"the tokenizer library refuses it: {error}"
        raise CorruptModel(source=path, problem=problem) from error
    except BaseException as error:
        # a Rust panic arrives as a class that cannot be imported
        if type(error).__name__ != "PanicException":
            raise
        problem = f"the tokenizer library panicked: {error}"
        raise CorruptModel(source=path, problem=problem) from error
    if longest > MAX_TOKEN_CHARACTERS:
        raise CorruptModel(source=path, problem=f"a token has {longest} characters")
    return inner


def _reduce(text: str, path: Path) -> str:
    try:
        file = msgspec.json.decode(text, type=_TokenizerFile)
        if "merges" in file.model:
            file.model["merges"] = msgspec.Raw(b"[]")
        parts = {"version": "1.0", "model": file.model, "added_tokens": file.added_tokens}
        reduced = msgspec.json.encode(parts | {"decoder": file.decoder}).decode()
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise CorruptModel(source=path, problem=f"is no tokenizer: {error}") from error
    size = _pattern_characters([file.normalizer, file.pre_tokenizer])
    if size > MAX_PATTERN_CHARACTERS:
        problem = f"{size} characters of regular expressions, at most {MAX_PATTERN_CHARACTERS}"
        raise CorruptModel(source=path, problem=problem)
    _check_decoders(file.decoder, path)
    return reduced


def _pattern_characters(part: object) -> int:
    """Count the characters of all ``{"Regex": …}`` in a part of the file."""
    if isinstance(part, list):
        return sum(_pattern_characters(value) for value in cast("list[object]", part))
    if not isinstance(part, dict):
        return 0
    entries = cast("dict[str, object]", part).items()
    return sum(
        len(value) if key == "Regex" and isinstance(value, str) else _pattern_characters(value)
        for key, value in entries
    )


def _check_decoders(decoder: object, path: Path) -> None:
    decoders = _flatten(decoder, path)
    if len(decoders) > MAX_DECODERS:
        problem = f"{len(decoders)} decoders, at most {MAX_DECODERS} may be"
        raise CorruptModel(source=path, problem=problem)
    for part in decoders:
        _check(part, path)


def _flatten(decoder: object, path: Path) -> list[Mapping[str, object]]:
    """Return a decoder, or those of a sequence, with sequences in it."""
    if decoder is None:
        return []
    if not isinstance(decoder, dict):
        raise CorruptModel(source=path, problem="`decoder` is no object")
    parts = cast("dict[str, object]", decoder)
    if parts.get("type") != "Sequence":
        return [parts]
    inner = parts.get("decoders")
    if not isinstance(inner, list):
        raise CorruptModel(source=path, problem="`decoder` is a sequence without decoders")
    return [flat for part in cast("list[object]", inner) for flat in _flatten(part, path)]


def _check(decoder: Mapping[str, object], path: Path) -> None:
    kind = decoder.get("type")
    if kind in _PLAIN_DECODERS:
        return
    pattern, content = decoder.get("pattern"), decoder.get("content")
    is_plain = isinstance(pattern, dict) and pattern.keys() == {"String"}
    if kind != "Replace" or not is_plain:
        problem = f"its decoder `{kind!s:.40}` is none that is run for every token"
        raise CorruptModel(source=path, problem=problem)
    if not isinstance(content, str) or len(content) > MAX_REPLACEMENT_CHARACTERS:
        problem = f"its decoder puts in more than {MAX_REPLACEMENT_CHARACTERS} characters"
        raise CorruptModel(source=path, problem=problem)
