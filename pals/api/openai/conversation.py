"""The messages of a request, as the driver takes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pals.api.openai.schema.messages import (
    AssistantMessage,
    DeveloperMessage,
    FunctionCall,
    FunctionMessage,
    RefusalPart,
    RequestMessage,
    TextPart,
    ToolMessage,
    UserMessage,
)
from pals.driver.interface import MadeCall, Message


def conversation(messages: Iterable[RequestMessage]) -> list[Message]:
    """Return messages with their content as plain text; text parts become lines.

    Calls of functions become calls of tools, which took their place.
    """
    return [_message(message) for message in messages]


def _message(message: RequestMessage) -> Message:
    match message:
        case AssistantMessage():
            return _assistant(message)
        case ToolMessage():
            return Message(
                role="tool",
                content=_text(message.content),
                name=message.name,
                tool_call_id=message.tool_call_id,
            )
        case FunctionMessage():
            return Message(
                role="tool",
                content=message.content or "",
                name=message.name,
                tool_call_id=_call_id(message.name),
            )
        case UserMessage():
            return Message(role="user", content=_text(message.content), name=message.name)
        case DeveloperMessage():
            return Message(role="developer", content=_text(message.content), name=message.name)
        case _:
            return Message(role="system", content=_text(message.content), name=message.name)


def _assistant(message: AssistantMessage) -> Message:
    calls = [
        MadeCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
        for call in message.tool_calls or ()
    ]
    if message.function_call is not None:
        calls.append(_call(message.function_call))
    content = _text(message.content) if message.content is not None else message.refusal
    return Message(
        role="assistant",
        content=content if content is not None or calls else "",
        name=message.name,
        tool_calls=tuple(calls),
        reasoning_content=message.reasoning_content,
    )


def _text(content: str | Sequence[TextPart | RefusalPart]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(p.text if isinstance(p, TextPart) else p.refusal for p in content)


def _call(call: FunctionCall) -> MadeCall:
    return MadeCall(id=_call_id(call.name), name=call.name, arguments=call.arguments)


def _call_id(function: str) -> str:
    """Return the id of a call that has none: its result names the function."""
    return f"call_{function}"
