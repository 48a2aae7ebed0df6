"""Text from a stream of token ids, without ever showing half a character."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from pals.text.tokenizer import Tokenizer

MAX_PENDING_TOKENS = 64
REPLACEMENT = "\ufffd"


class StreamDetokenizer:
    """Turn one session's token ids into text, token by token.

    The pieces joined are `Tokenizer.decode` of all ids, special tokens skipped. Each push
    looks at a bounded number of tokens. The one bound on that promise: outside of
    byte-level vocabularies, a run of more than ``MAX_PENDING_TOKENS`` byte tokens that is
    not UTF-8 as a whole is given up piece by piece.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        """Begin a text.

        Args:
            tokenizer: The model's.
            context: Tokens that it goes on with, whose own text is out already.
        """
        byte_level = tokenizer.is_byte_level
        self._stream: _Stream = _ByteStream(tokenizer) if byte_level else _WindowStream(tokenizer)
        for token in context:
            self._stream.push(token)

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that no later token can change."""
        return self._stream.push(token_id)

    def finish(self) -> str:
        """Return what was held back: the stream ends inside a character."""
        return self._stream.finish()


class _Stream(Protocol):
    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class _ByteStream:
    """Byte-level BPE: tokens are bytes, so that an incremental UTF-8 decoder is exact.

    Python and Rust replace ill-formed bytes alike (Unicode 15, table 3-8).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowStream:
    """Any other decoder: compare the text of a short window with and without new tokens.

    The window starts with tokens that are out already, because a SentencePiece decoder
    drops the space that leads the first token it sees.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        if self._tokenizer.is_skipped(token_id):
            # it must neither become the window's first token nor end a run of bytes
            return ""
        self._pending.append(token_id)
        if len(self._pending) < MAX_PENDING_TOKENS and self._is_open(token_id):
            return ""
        return self._flush()

    def finish(self) -> str:
        return self._flush()

    def _is_open(self, token_id: int) -> bool:
        """Return whether the next token may change how this one reads."""
        return self._tokenizer.is_byte_token(token_id) or self._text([token_id]).endswith(
            REPLACEMENT
        )

    def _flush(self) -> str:
        before = self._text(self._context)
        text = self._text(self._context + self._pending)[len(before) :]
        if text or len(self._pending) >= MAX_PENDING_TOKENS:
            self._context, self._pending = self._pending, []
        return text

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)
