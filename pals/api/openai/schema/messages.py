"""The messages of a conversation (`ChatCompletionRequestMessage`)."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

FunctionName = Annotated[str, Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
ParticipantName = Annotated[str, Meta(max_length=256)]
CallId = Annotated[str, Meta(max_length=256)]


class Part(Struct, frozen=True, kw_only=True, tag_field="type", forbid_unknown_fields=True):
    """A piece of a message's content."""


class Turn(Struct, frozen=True, kw_only=True, tag_field="role", forbid_unknown_fields=True):
    """A message, by whose it is."""


class TextPart(Part, frozen=True, kw_only=True, tag="text"):
    """A piece of text in a message's content."""

    text: str


class RefusalPart(Part, frozen=True, kw_only=True, tag="refusal"):
    """What the assistant said instead of an answer."""

    refusal: str


Text = str | Annotated[list[TextPart], Meta(min_length=1)]


class FunctionCall(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was called, with its arguments in JSON."""

    name: str
    arguments: str


class FunctionToolCall(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A call that an earlier answer made (`ChatCompletionMessageToolCall`)."""

    id: CallId
    function: FunctionCall
    type: Literal["function"] = "function"


class SystemMessage(Turn, frozen=True, kw_only=True, tag="system"):
    """What the model is to be."""

    content: Text
    name: ParticipantName | None = None


class DeveloperMessage(Turn, frozen=True, kw_only=True, tag="developer"):
    """The newer name of a system message."""

    content: Text
    name: ParticipantName | None = None


class UserMessage(Turn, frozen=True, kw_only=True, tag="user"):
    """What somebody says."""

    content: Text
    name: ParticipantName | None = None


class AssistantMessage(Turn, frozen=True, kw_only=True, tag="assistant"):
    """An earlier answer."""

    content: str | Annotated[list[TextPart | RefusalPart], Meta(min_length=1)] | None = None
    refusal: str | None = None
    name: ParticipantName | None = None
    tool_calls: list[FunctionToolCall] | None = None
    function_call: FunctionCall | None = None
    reasoning_content: str | None = None
    audio: None = None
    annotations: Annotated[list[object], Meta(max_length=0)] | None = None


class ToolMessage(Turn, frozen=True, kw_only=True, tag="tool"):
    """What a tool returned."""

    content: Text
    tool_call_id: CallId
    name: ParticipantName | None = None


class FunctionMessage(Turn, frozen=True, kw_only=True, tag="function"):
    """What a function returned, in the form that tools replaced."""

    name: ParticipantName
    content: str | None


RequestMessage = (
    SystemMessage
    | DeveloperMessage
    | UserMessage
    | AssistantMessage
    | ToolMessage
    | FunctionMessage
)
