"""Conversations: requests (`CreateChatCompletionRequest`)."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from pals.api.openai.schema.messages import FunctionName, RequestMessage
from pals.api.openai.schema.shared import GenerationRequest, Label, TokenLimit

MAX_MESSAGES = 2048
MAX_TOOLS = 128
MAX_TOP_LOGPROBS = 20

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
JsonSchema = dict[str, object]


class FunctionObject(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: JsonSchema | None = None
    strict: bool | None = None


class FunctionTool(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tool (`ChatCompletionTool`)."""

    type: Literal["function"]
    function: FunctionObject


class ToolName(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which function is meant."""

    name: str


class NamedChoice(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="function"
):
    """The one function to call (`ChatCompletionNamedToolChoice`)."""

    function: ToolName


class NamedTool(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tool that is allowed."""

    type: Literal["function"]
    function: ToolName


class AllowedTools(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Some of the tools (`ChatCompletionAllowedTools`)."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Meta(max_length=MAX_TOOLS)]


class AllowedChoice(
    Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="type",
    tag="allowed_tools",
):
    """A choice among some of the tools (`ChatCompletionAllowedToolsChoice`)."""

    allowed_tools: AllowedTools


class TextFormat(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="text"
):
    """Any text."""


class JsonObjectFormat(
    Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="type",
    tag="json_object",
):
    """Any JSON object."""


class SchemaFormat(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A JSON schema and its name; it is kept to, be it strict or not."""

    name: FunctionName
    description: str | None = None
    schema: JsonSchema | None = None
    strict: bool | None = None


class JsonSchemaFormat(
    Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="type",
    tag="json_schema",
):
    """JSON of a schema (`ResponseFormatJsonSchema`)."""

    json_schema: SchemaFormat


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """A request for the next turn of a conversation."""

    messages: Annotated[list[RequestMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: TokenLimit | None = None
    max_completion_tokens: TokenLimit | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    reasoning_effort: Effort | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | AllowedChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[FunctionObject], Meta(max_length=MAX_TOOLS)] | None = None
    function_call: Literal["none", "auto"] | ToolName | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: Annotated[dict[str, Label], Meta(max_length=16)] | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
