"""Messages in OpenAI's form, which a family's format makes fit for its template."""

from __future__ import annotations

from pals.driver.interface import MadeCall, Message

Json = dict[str, object]


def turn_of(message: Message) -> Json:
    """Return a message in OpenAI's form; what it lacks is left out, and its content is text."""
    turn: Json = {"role": message.role, "content": message.content or ""}
    optional = {
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "tool_calls": [_call(made) for made in message.tool_calls] or None,
        "reasoning_content": message.reasoning_content,
    }
    return turn | {name: value for name, value in optional.items() if value is not None}


def _call(made: MadeCall) -> Json:
    function = {"name": made.name, "arguments": made.arguments}
    return {"id": made.id, "type": "function", "function": function}
