"""Completions of prompts (`CreateCompletionRequest`, `CreateCompletionResponse`)."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from pals.api.openai.schema.shared import GenerationRequest, OptionalUsage

DEFAULT_MAX_TOKENS = 16
MAX_LOGPROBS = 5
MAX_BEST_OF = 16


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """A request for what follows upon prompts; ``prompt`` is read by `prompts`."""

    prompt: object
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    best_of: Annotated[int, Meta(ge=0, le=MAX_BEST_OF)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None


class CompletionLogprobs(Struct, frozen=True, kw_only=True):
    """Scores of tokens, each list with one entry a token.

    Attributes:
        tokens: Their text.
        token_logprobs: None for the first token of a prompt, which follows upon nothing.
        top_logprobs: The likeliest tokens, and the token itself where it is none of them.
        text_offset: Where each begins in the text, in characters.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Struct, frozen=True, kw_only=True):
    """One answer, or what a chunk adds to it."""

    text: str
    index: int
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class TextCompletion(Struct, frozen=True, kw_only=True):
    """All answers, or one chunk of a stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    object: Literal["text_completion"] = "text_completion"
    usage: OptionalUsage = msgspec.UNSET
