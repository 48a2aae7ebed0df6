"""Conversations: answers (`CreateChatCompletionResponse` and its streamed form)."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from pals.api.openai.schema.messages import FunctionCall
from pals.api.openai.schema.shared import OptionalUsage, Usage

Tier = Literal["default"] | UnsetType
"""Told where a request names a service tier: there is only one."""


class TopLogprob(Struct, frozen=True, kw_only=True):
    """One of the likeliest tokens at a place."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob, frozen=True, kw_only=True):
    """A token and its score (`ChatCompletionTokenLogprob`)."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True, kw_only=True):
    """The scores of an answer's tokens, or of those of a chunk."""

    content: list[TokenLogprob]
    refusal: None = None


class MadeToolCall(Struct, frozen=True, kw_only=True):
    """A call that the model made."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class AnswerMessage(Struct, frozen=True, kw_only=True):
    """An answer; ``content`` is null where it only calls (`ChatCompletionResponseMessage`)."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[MadeToolCall] | UnsetType = UNSET
    function_call: FunctionCall | UnsetType = UNSET


class Choice(Struct, frozen=True, kw_only=True):
    """One answer, and how it ended."""

    message: AnswerMessage
    finish_reason: str
    index: int
    logprobs: ChatLogprobs | None = None


class ChatCompletion(Struct, frozen=True, kw_only=True):
    """All answers."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"
    service_tier: Tier = UNSET


class FunctionDelta(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a chunk adds to a call: first the name, then pieces of the arguments."""

    name: str | None = None
    arguments: str | UnsetType = UNSET


class ToolCallDelta(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a chunk adds to one of the calls (`ChatCompletionMessageToolCallChunk`)."""

    index: int
    function: FunctionDelta
    id: str | None = None
    type: Literal["function"] | None = None


class AnswerDelta(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a chunk adds to an answer (`ChatCompletionStreamResponseDelta`)."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    function_call: FunctionDelta | None = None


class ChunkChoice(Struct, frozen=True, kw_only=True):
    """One answer's part of a chunk."""

    delta: AnswerDelta
    index: int
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None


class ChatChunk(Struct, frozen=True, kw_only=True):
    """One event of a stream."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    service_tier: Tier = UNSET
    usage: OptionalUsage = msgspec.UNSET
