"""Scores of tokens in the two forms that OpenAI has for them."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from pals.api.openai.schema.answers import ChatLogprobs, TokenLogprob, TopLogprob
from pals.api.openai.schema.completions import CompletionLogprobs
from pals.driver.interface import TokenScore, TopScore

LEAST_LOGPROB = -9999.0
"""What OpenAI writes for a token that cannot come; JSON has no infinity."""


def token_text(raw: bytes) -> str:
    r"""Return how a token reads; bytes that are only part of a character as ``\xe2``."""
    return raw.decode("utf-8", "backslashreplace")


def chat_logprobs(scores: Sequence[TokenScore]) -> ChatLogprobs:
    """Return the scores of an answer, or of a chunk, in the form of conversations."""
    return ChatLogprobs(
        content=[
            TokenLogprob(
                token=token_text(score.raw),
                logprob=_bounded(score.logprob),
                bytes=list(score.raw),
                top_logprobs=[_top(top) for top in score.top],
            )
            for score in scores
        ]
    )


def _top(top: TopScore) -> TopLogprob:
    logprob = _bounded(top.logprob)
    return TopLogprob(token=token_text(top.raw), logprob=logprob, bytes=list(top.raw))


def _bounded(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


class TextScores:
    """Writes the scores of one answer to a prompt, and counts the characters on the way."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0
        self._begun = False

    def write(self, text: str, scores: Sequence[TokenScore]) -> CompletionLogprobs:
        """Return the scores of what an answer gains.

        Args:
            text: What it gains; the first time it tells whether the decoder has dropped the
                space that leads its first token.
            scores: Of its tokens.
        """
        return CompletionLogprobs(
            text_offset=[self._place(text, score) for score in scores],
            tokens=[_old_text(score.raw) for score in scores],
            token_logprobs=[_bounded(s.logprob) if s.scored else None for s in scores],
            top_logprobs=[_likeliest(s) if s.scored else None for s in scores],
        )

    def _place(self, text: str, score: TokenScore) -> int:
        place = self._offset
        if not score.hidden:
            is_dropped = not self._begun and not text.startswith(" ")
            raw = score.raw.removeprefix(b" ") if is_dropped else score.raw
            self._begun = True
            self._offset += len(self._decoder.decode(raw))
        return place


def _old_text(raw: bytes) -> str:
    r"""Return how a token reads in the older form, where one of part of a character is marked."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _likeliest(score: TokenScore) -> dict[str, float]:
    """Return the likeliest tokens by their text, and the token itself; the likelier wins."""
    found: dict[str, float] = {}
    for each in (*score.top, score):
        found.setdefault(_old_text(each.raw), _bounded(each.logprob))
    return found
