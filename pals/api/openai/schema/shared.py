"""What requests and responses of several routes share."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

MAX_STOP_STRINGS = 4
MAX_BIASED_TOKENS = 300
MAX_CHOICES = 16
"""Answers that one request may ask for; each is a session on every shard."""

TokenLimit = Annotated[int, Meta(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Temperature = Annotated[float, Meta(ge=0, le=2)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
LogitBias = Annotated[dict[str, Bias], Meta(max_length=MAX_BIASED_TOKENS)]
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
StopList = Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)]
Label = Annotated[str, Meta(max_length=1024)]
Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]


class StreamOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a stream carries besides the text (`ChatCompletionStreamOptions`)."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationRequest(Struct, frozen=True, kw_only=True):
    """The fields of a request that conversations and prompts have in common."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: Fraction | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    min_p: Fraction | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    seed: Seed | None = None
    stop: StopString | StopList | None = None
    n: Choices | None = None
    user: Label | None = None

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class PromptTokens(Struct, frozen=True, kw_only=True):
    """Of the tokens of a prompt, those that a chain had computed before."""

    cached_tokens: int


class CompletionTokens(Struct, frozen=True, kw_only=True):
    """Of the tokens of the answers, those that the model wrote to itself."""

    reasoning_tokens: int


class Usage(Struct, frozen=True, kw_only=True):
    """Tokens that a request took (`CompletionUsage`)."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens
    completion_tokens_details: CompletionTokens


OptionalUsage = Usage | msgspec.UnsetType | None
"""Left out of the chunks of a stream unless the request asks for it, and null until the last."""
