"""Answers to prompts, whole and in chunks, which have the same form."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from msgspec import UNSET

from pals.api.openai.logprobs import TextScores
from pals.api.openai.schema.completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    TextCompletion,
)
from pals.api.openai.schema.shared import OptionalUsage, Usage
from pals.driver.interface import Delta
from pals.text.answers.pieces import Content


class CompletionForm:
    """Writes the answers to the prompts of one request.

    Args:
        request: The request.
        choices: How many answers there will be.
    """

    def __init__(self, request: CompletionRequest, *, choices: int) -> None:
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = request.model
        self._scores = [TextScores() for _ in range(choices)]
        self._scored = request.logprobs is not None
        self._include_usage = request.includes_usage

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> TextCompletion:
        """Return all answers."""
        gains: list[list[Delta]] = [[] for _ in self._scores]
        for delta in deltas:
            gains[delta.choice].append(delta)
        choices = [self._choice(index, gained) for index, gained in enumerate(gains)]
        return self._completion(choices, usage)

    def chunks(self, delta: Delta) -> list[TextCompletion]:
        """Return the chunk of a delta, unless it is empty."""
        if not (delta.pieces or delta.scores or delta.finish_reason):
            return []
        usage = None if self._include_usage else UNSET
        return [self._completion([self._choice(delta.choice, [delta])], usage)]

    def usage_chunk(self, usage: Usage) -> TextCompletion | None:
        """Return the last chunk, where the request asks for it."""
        return self._completion([], usage) if self._include_usage else None

    def _completion(self, choices: list[CompletionChoice], usage: OptionalUsage) -> TextCompletion:
        return TextCompletion(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        )

    def _choice(self, index: int, gained: Sequence[Delta]) -> CompletionChoice:
        pieces = [piece for delta in gained for piece in delta.pieces]
        text = "".join(piece.text for piece in pieces if isinstance(piece, Content))
        reasons = [delta.finish_reason for delta in gained if delta.finish_reason is not None]
        return CompletionChoice(
            text=text,
            index=index,
            logprobs=self._logprobs(index, text, gained),
            finish_reason=reasons[0] if reasons else None,
        )

    def _logprobs(
        self, index: int, text: str, gained: Sequence[Delta]
    ) -> CompletionLogprobs | None:
        if not self._scored:
            return None
        return self._scores[index].write(text, [s for delta in gained for s in delta.scores])
