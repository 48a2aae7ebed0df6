"""Text to token ids and back, over the `tokenizers` library.

Encoding runs regular expressions that came with the weights, some of which take hours, and
normalizers, some of which make gigabytes of a word: it happens in a process with limits
(`child`), which is killed when it exceeds them. Decoding is needed for every token and runs
here, by a copy of the tokenizer that holds no pattern (`decoding`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import tokenizers
from tokenizers import decoders

from pals.errors import CorruptModel, InvalidText
from pals.text.child import TextChild
from pals.text.decoding import load_decoder
from pals.text.files import load_settings, load_special_tokens, load_text
from pals.text.sandbox import (
    ENCODE,
    ENCODE_WITH_SPECIAL_TOKENS,
    LOAD_TOKENIZER,
    SLOWEST_BYTES_PER_S,
)
from pals.types import MAX_TOKENIZER_BYTES

MAX_TEXT_CHARACTERS = 4 << 20
MAX_TOKEN_ID = 1 << 32
MAX_EOS_TOKENS = 64
LOAD_DEADLINE_S = 20.0
ENCODE_DEADLINE_S = 4.0
"""For a prompt of usual length; a long one has its bytes' time on top."""

_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


class Tokenizer:
    """The tokenizer of one model folder; immutable, and safe to use from any thread.

    Attributes:
        special_tokens: Token text by role, as chat templates name them (``bos_token``, …).
        special_ids: Ids that `decode` skips by default: control tokens, not text.
        eos_token_ids: Ids that end an answer, from every file that names some.
        is_byte_level: Each token stands for fixed bytes, see `token_bytes`.
        vocab_size: Number of tokens; the model's embedding may have more rows.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        child: TextChild,
        *,
        special_tokens: dict[str, str],
        eos_token_ids: Iterable[int],
    ) -> None:
        self._inner = inner
        self._child = child
        self.special_tokens = special_tokens
        added = inner.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.eos_token_ids = frozenset(eos_token_ids)
        self.is_byte_level = isinstance(inner.decoder, decoders.ByteLevel)
        self.vocab_size = inner.get_vocab_size(with_added_tokens=True)
        self._leading_bos = self._bos_that_the_tokenizer_adds()

    @classmethod
    def load(cls, folder: Path, child: TextChild | None = None) -> Tokenizer:
        """Read tokenizer.json and the settings beside it.

        Args:
            folder: The model's folder.
            child: The process to encode in; by default one of its own.

        Raises:
            CorruptModel: A file is missing, too large, or does not make a tokenizer, or
                the tokens that end an answer are too many or not the model's.
        """
        path = folder / "tokenizer.json"
        text = load_text(path, maximum=MAX_TOKENIZER_BYTES)
        if text is None:
            raise CorruptModel(source=path, problem="there is no such file")
        inner = load_decoder(text, path)
        child = child or TextChild()
        child.load(
            LOAD_TOKENIZER,
            text.encode(),
            LOAD_DEADLINE_S,
            lambda problem: CorruptModel(source=path, problem=problem),
        )
        special_tokens = load_special_tokens(folder)
        eos_token_ids = _load_eos_token_ids(folder, inner, special_tokens.get("eos_token"))
        return cls(inner, child, special_tokens=special_tokens, eos_token_ids=eos_token_ids)

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of ``text``.

        Args:
            text: A rendered chat prompt or plain text.
            add_special_tokens: Let the tokenizer put its BOS first. False for a rendered
                chat prompt, where the template has written it already.

        Raises:
            InvalidText: ``text`` is too long or holds half a surrogate pair.
            CorruptModel: The tokenizer's own pattern fails on this text, or takes too long.
        """
        if len(text) > MAX_TEXT_CHARACTERS:
            raise InvalidText(problem=f"{len(text)} characters, at most {MAX_TEXT_CHARACTERS} fit")
        try:
            encoded = text.encode()
        except UnicodeEncodeError as error:
            raise InvalidText(problem=f"no Unicode text at character {error.start}") from None
        kind = ENCODE_WITH_SPECIAL_TOKENS if add_special_tokens else ENCODE
        deadline_s = ENCODE_DEADLINE_S + len(encoded) / SLOWEST_BYTES_PER_S
        answer = self._child.ask(kind, encoded, deadline_s, _encoding_failed)
        assert answer["ids"] is not None
        return answer["ids"]

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt; if the tokenizer adds a BOS they begin with exactly one.

        A chat template may have written it, or not; a user may have typed it. The EOS that
        some tokenizers add is left out: an answer is to follow.

        Args:
            text: A rendered chat prompt or plain text.

        Raises:
            InvalidText: As `encode`.
            CorruptModel: As `encode`.
        """
        ids = self.encode(text, add_special_tokens=False)
        return ids if ids[:1] == self._leading_bos else [*self._leading_bos, *ids]

    def _bos_that_the_tokenizer_adds(self) -> list[int]:
        bos = None if self.bos_token is None else self._inner.token_to_id(self.bos_token)
        return [bos] if bos in self.encode("", add_special_tokens=True)[:1] else []

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``; ids that the tokenizer does not know are skipped.

        Bytes that are not UTF-8 become U+FFFD.
        """
        known = [i for i in ids if 0 <= i < MAX_TOKEN_ID]
        return self._inner.decode(known, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token of a byte-level vocabulary stands for.

        Special and unknown ids stand for none, as in `decode`.
        """
        assert self.is_byte_level
        token = "" if self.is_skipped(token_id) else self._token(token_id)
        if all(character in _BYTE_OF_CHARACTER for character in token):
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        # an added token that holds characters outside of the byte alphabet, such as a space
        return token.encode()

    def is_skipped(self, token_id: int) -> bool:
        """Return whether `decode` leaves a token out: it is special, or unknown."""
        return token_id in self.special_ids or not self._token(token_id)

    def added_tokens(self) -> dict[str, int]:
        """Return the ids of the tokens beside the vocabulary, special or not, by their names."""
        return {str(token): i for i, token in self._inner.get_added_tokens_decoder().items()}

    def is_byte_token(self, token_id: int) -> bool:
        """Return whether a token is one byte (``<0x0A>``) of a SentencePiece vocabulary."""
        return _BYTE_TOKEN.fullmatch(self._token(token_id)) is not None

    def _token(self, token_id: int) -> str:
        known = 0 <= token_id < MAX_TOKEN_ID
        return (self._inner.id_to_token(token_id) if known else None) or ""


def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's alphabet: printable Latin-1 as itself, other bytes from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


_BYTE_OF_CHARACTER = _byte_of_character()


def _load_eos_token_ids(
    folder: Path, inner: tokenizers.Tokenizer, named: str | None
) -> frozenset[int]:
    """Return the ids that end an answer: those of the files, and that of the ``named`` token.

    Raises:
        CorruptModel: A file names none of the model's vocabulary, or they are too many.
    """
    vocab_size = load_settings(folder / "config.json").get("vocab_size")
    if type(vocab_size) is not int:
        vocab_size = inner.get_vocab_size(with_added_tokens=True)
    eos = None if named is None else inner.token_to_id(named)
    # the tokenizer may know tokens that the model cannot produce
    ids = {eos} if eos is not None and eos < vocab_size else set[int]()
    for name in ("generation_config.json", "config.json"):
        ids |= _listed_token_ids(folder / name, vocab_size)
    if len(ids) > MAX_EOS_TOKENS:
        problem = f"{len(ids)} tokens end an answer, at most {MAX_EOS_TOKENS} may"
        raise CorruptModel(source=folder, problem=problem)
    return frozenset(ids)


def _listed_token_ids(path: Path, vocab_size: int) -> set[int]:
    value = load_settings(path).get("eos_token_id")
    if value is None:
        return set()
    listed = cast("list[object]", value) if isinstance(value, list) else [value]
    ids = {i for i in listed if type(i) is int and 0 <= i < vocab_size}
    if not all(type(i) is int and i in ids for i in listed):
        problem = f"`eos_token_id` holds something else than token ids below {vocab_size}"
        raise CorruptModel(source=path, problem=problem)
    return ids


def _encoding_failed(problem: str) -> CorruptModel:
    return CorruptModel(source="tokenizer.json", problem=f"encoding a text: {problem}")
