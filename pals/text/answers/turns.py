"""Conversations and tools as a family's chat template wants to be given them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from pals.errors import InvalidRequest
from pals.text.answers.families import Family
from pals.text.answers.tools import ToolSpec

Turn = Mapping[str, object]
"""A message in OpenAI's form: ``tool_calls`` hold their arguments as JSON text."""

_SYSTEM_ROLES = frozenset({"system", "developer"})
_SHORT_ID_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_SHORT_ID_CHARACTERS = 9


def tool_objects(tools: Sequence[ToolSpec]) -> list[Turn]:
    """Return tools as OpenAI's objects, with every key that templates read."""
    return [{"type": "function", "function": _function(tool)} for tool in tools]


def _function(tool: ToolSpec) -> dict[str, object]:
    parameters = tool.parameters or {"type": "object", "properties": {}}
    return {"name": tool.name, "description": tool.description or "", "parameters": parameters}


def turns_for(
    family: Family, messages: Sequence[Turn], described: Sequence[ToolSpec]
) -> list[Turn]:
    """Return messages in the shape that a family's template reads.

    Instructions come first, in one turn; calls have their arguments as the template writes
    them; and what it cannot render at all is told as text.

    Args:
        family: Whose template it is.
        messages: The conversation.
        described: Tools that the template does not write into the prompt by itself.

    Raises:
        InvalidRequest: The arguments of an earlier call are no JSON object.
    """
    made = _calls_made(messages)
    turns: list[Turn] = [_shaped(family, message, made) for message in messages]
    if family.flattened:
        turns = _flattened(family, turns)
    if family.one_call_a_turn:
        turns = _with_one_call_each(turns)
    told = [description(family, described)] if described else []
    return _with_instructions_first(family, turns, told)


def description(family: Family, tools: Sequence[ToolSpec]) -> str:
    """Return what a model is told of tools where its template tells it nothing."""
    functions = [json.dumps(_function(tool), ensure_ascii=False) for tool in tools]
    arguments = '{"argument": "value"}'
    return "\n".join(
        [
            "You can call these tools, each described by a JSON object:",
            *functions,
            "To call one, answer with nothing but its name and its arguments in this form:",
            _written(family, [("NAME", arguments)]),
        ]
    )


def _written(family: Family, calls: Sequence[tuple[str, str]]) -> str:
    """Return calls, each a name and its arguments in JSON, as the family writes them."""
    syntax = family.syntax
    texts = [syntax.name + name + syntax.arguments + text + syntax.end for name, text in calls]
    return syntax.before + (syntax.between or "").join(texts) + syntax.after


# --- one turn ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Made:
    """A call of an earlier turn: its tool's name, and its place among all of them."""

    name: str
    place: int


def _calls_made(messages: Sequence[Turn]) -> dict[str, _Made]:
    """Return the calls of a conversation by their ids."""
    calls = [call for message in messages for call in _calls_of(message)]
    return {
        str(call.get("id")): _Made(str(_object_at(call, "function").get("name")), place)
        for place, call in enumerate(calls)
    }


def _calls_of(turn: Turn) -> list[Turn]:
    calls = turn.get("tool_calls")
    return cast("list[Turn]", calls) if isinstance(calls, list) else []


def _object_at(turn: Turn, key: str) -> Turn:
    value = turn.get(key)
    return cast("Turn", value) if isinstance(value, dict) else {}


def _shaped(family: Family, message: Turn, made: Mapping[str, _Made]) -> dict[str, object]:
    role = message.get("role")
    calls = _calls_of(message)
    content = message.get("content") or ""
    turn: dict[str, object] = {"role": "system" if role in _SYSTEM_ROLES else role}
    turn["content"] = family.no_content if calls and not content else content
    if calls:
        turn["tool_calls"] = [_call(family, call, made) for call in calls]
    if message.get("reasoning_content"):
        turn[family.reasoning_key] = message["reasoning_content"]
    if message.get("name"):
        turn["name"] = message["name"]
    if role == "tool":
        call_id = str(message.get("tool_call_id"))
        turn["tool_call_id"] = _id(family, call_id, made)
        turn.setdefault("name", made[call_id].name if call_id in made else "")
    return turn


def _call(family: Family, call: Turn, made: Mapping[str, _Made]) -> dict[str, object]:
    function = _object_at(call, "function")
    text = str(function.get("arguments") or "{}")
    arguments = text if family.arguments == "text" else _decoded(text)
    return {
        "id": _id(family, str(call.get("id")), made),
        "type": "function",
        "function": {"name": function.get("name"), "arguments": arguments},
    }


def _decoded(text: str) -> object:
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        problem = "the `arguments` of an earlier call are no JSON object"
        raise InvalidRequest(problem=problem, param="messages")
    return cast("dict[str, object]", arguments)


def _id(family: Family, call_id: str, made: Mapping[str, _Made]) -> str:
    """Return an id of the form that the template takes, the same for the same id."""
    if family.ids == "any" or (family.ids == "numbered" and call_id not in made):
        return call_id
    if family.ids == "numbered":
        return f"functions.{made[call_id].name}:{made[call_id].place}"
    digest = hashlib.sha256(call_id.encode(errors="replace")).digest()
    letters = [_SHORT_ID_ALPHABET[byte % len(_SHORT_ID_ALPHABET)] for byte in digest]
    return "".join(letters[:_SHORT_ID_CHARACTERS])


# --- all turns -----------------------------------------------------------------------


def _with_instructions_first(family: Family, turns: list[Turn], told: list[str]) -> list[Turn]:
    """Return turns with those of the system that lead them as one, and ``told`` in it."""
    is_system = [turn["role"] == "system" for turn in turns]
    leading = len(turns) if all(is_system) else is_system.index(False)
    # harmony's template knows no other place and leaves out what is said later
    chosen = [s and (at < leading or family.one_system_turn) for at, s in enumerate(is_system)]
    texts = [str(turn["content"]) for turn, taken in zip(turns, chosen, strict=True) if taken]
    rest = [turn for turn, taken in zip(turns, chosen, strict=True) if not taken]
    joined = "\n\n".join([*texts, *told])
    return [{"role": "system", "content": joined}, *rest] if texts or told else rest


def _with_one_call_each(turns: Sequence[Turn]) -> list[Turn]:
    """Split turns with several calls, each followed by its result."""
    split: list[Turn] = []
    calls: list[Turn] = []
    for turn in turns:
        if turn["role"] == "tool" and calls:
            at = _place_of(split, turn, calls)
            split.insert(at, turn)
            continue
        calls = _calls_of(turn)
        split += [turn] if len(calls) <= 1 else _one_call_each(turn, calls)
    return split


def _one_call_each(turn: Turn, calls: Sequence[Turn]) -> list[Turn]:
    rest = [{"role": turn["role"], "content": "", "tool_calls": [call]} for call in calls[1:]]
    return [{**turn, "tool_calls": [calls[0]]}, *rest]


def _place_of(split: Sequence[Turn], result: Turn, calls: Sequence[Turn]) -> int:
    """Return the place behind the call that a result answers; the end if there is none."""
    for at in range(len(split) - 1, -1, -1):
        made = _calls_of(split[at])
        if made and made[0].get("id") == result["tool_call_id"]:
            return at + 1
        if made and made[0] is calls[0]:
            break
    return len(split)


def _flattened(family: Family, turns: Sequence[Turn]) -> list[Turn]:
    """Tell calls and their results as text; results and what a user says next are one turn."""
    flat: list[Turn] = []
    last: object = None
    for turn in turns:
        told = _as_text(family, turn)
        if flat and told["role"] == "user" == flat[-1]["role"] and "tool" in (turn["role"], last):
            flat[-1] = {"role": "user", "content": f"{flat[-1]['content']}\n\n{told['content']}"}
        else:
            flat.append(told)
        last = turn["role"]
    return flat


def _as_text(family: Family, turn: Turn) -> Turn:
    if turn["role"] == "tool":
        return {"role": "user", "content": f"Result of {turn['name']}:\n{turn['content']}"}
    calls = [_object_at(call, "function") for call in _calls_of(turn)]
    if not calls:
        return turn
    written = [(str(f["name"]), json.dumps(f["arguments"], ensure_ascii=False)) for f in calls]
    parts = [str(turn["content"]), _written(family, written)]
    return {"role": turn["role"], "content": "\n".join(part for part in parts if part)}
