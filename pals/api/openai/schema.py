"""Chat completion requests and responses, field for field as OpenAI writes them.

Source: `CreateChatCompletionRequest`, `CreateChatCompletionResponse` and
`CreateChatCompletionStreamResponse` in OpenAI's published OpenAPI schema.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

MAX_MESSAGES = 2048
MAX_STOP_STRINGS = 4

PositiveInt = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
StopList = Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)]
Role = Literal["system", "developer", "user", "assistant", "tool"]


class TextPart(Struct, frozen=True, kw_only=True):
    """A piece of text in a message's content."""

    type: Literal["text"]
    text: str


class RequestMessage(Struct, frozen=True, kw_only=True):
    """One message of a request."""

    role: Role
    content: str | list[TextPart] | None = None


class StreamOptions(Struct, frozen=True, kw_only=True):
    """What a stream carries besides the text."""

    include_usage: bool | None = None


class ChatRequest(Struct, frozen=True, kw_only=True):
    """The fields of a chat completion request that this version implements."""

    model: str
    messages: Annotated[list[RequestMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    stop: StopString | StopList | None = None
    seed: Seed | None = None


class Model(Struct, frozen=True, kw_only=True):
    """A model that can be asked."""

    id: str
    created: int
    object: Literal["model"] = "model"
    owned_by: str = "pals"


class ModelList(Struct, frozen=True, kw_only=True):
    """The models that can be asked."""

    data: list[Model]
    object: Literal["list"] = "list"


class Usage(Struct, frozen=True, kw_only=True):
    """Tokens that a completion took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AnswerMessage(Struct, frozen=True, kw_only=True):
    """The answer of a completion."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class Choice(Struct, frozen=True, kw_only=True):
    """One answer of a completion."""

    message: AnswerMessage
    finish_reason: str
    index: int = 0
    logprobs: None = None


class ChatCompletion(Struct, frozen=True, kw_only=True):
    """A whole completion."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"


class Delta(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a chunk adds to the answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Struct, frozen=True, kw_only=True):
    """One answer's part of a chunk."""

    delta: Delta
    finish_reason: str | None = None
    index: int = 0
    logprobs: None = None


class Chunk(Struct, frozen=True, kw_only=True):
    """One event of a stream; ``usage`` is left out unless the request asks for it."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
