"""A request body to a `ChatRequest`, refusing by name whatever would be ignored.

An option that is silently dropped gives answers the caller did not ask for, so each
field of OpenAI's schema is implemented, has no effect on the answer, or is refused
unless its value is the one that asks for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

import msgspec

from pals.api.openai.schema import ChatRequest
from pals.driver.interface import GenerateParams, Message
from pals.errors import InvalidRequest, UnknownParameter, UnsupportedParameter

IMPLEMENTED = frozenset(ChatRequest.__struct_fields__)

WITHOUT_EFFECT = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})
"""Fields that label or speed up a request and change no answer."""

NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields not implemented yet, with the values (besides null) that ask for nothing."""

_MESSAGE_FIELDS = frozenset({"role", "content", "tool_call_id"})
_MESSAGE_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
    "tool_calls": ([],),
}
_STREAM_OPTION_FIELDS = frozenset({"include_usage"})
_STREAM_OPTION_NEUTRAL: Mapping[str, tuple[object, ...]] = {"include_obfuscation": (False,)}

_LOCATED = re.compile(r"^(?P<problem>.*) - at `\$\.?(?P<param>[^`]*)`$", re.DOTALL)

JsonObject = dict[str, object]


def parse_request(body: bytes) -> ChatRequest:
    """Read a chat completion request.

    Raises:
        InvalidRequest: It is not JSON, or a value has the wrong type or range.
        UnsupportedParameter: It asks for something that is not implemented.
        UnknownParameter: It has a field that OpenAI's schema does not know.
    """
    raw = _decode_object(body)
    _check_names(raw, IMPLEMENTED | WITHOUT_EFFECT, NEUTRAL_VALUES, prefix="")
    _check_messages(raw.get("messages"))
    if isinstance(options := raw.get("stream_options"), dict):
        known = cast("JsonObject", options)
        _check_names(known, _STREAM_OPTION_FIELDS, _STREAM_OPTION_NEUTRAL, prefix="stream_options.")
    try:
        request = msgspec.convert(raw, ChatRequest)
    except msgspec.ValidationError as error:
        raise _invalid_value(error) from None
    _check_combinations(request)
    return request


def generate_params(request: ChatRequest) -> GenerateParams:
    """Return how the driver makes the completion; what is left out has OpenAI's default."""
    stop = request.stop or ()
    return GenerateParams(
        max_tokens=request.max_completion_tokens or request.max_tokens,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
    )


def conversation(request: ChatRequest) -> list[Message]:
    """Return the messages with their content as plain text; text parts become lines."""
    return [
        Message(
            role=message.role,
            content="\n".join(part.text for part in message.content)
            if isinstance(message.content, list)
            else message.content or "",
        )
        for message in request.messages
    ]


def _decode_object(body: bytes) -> JsonObject:
    try:
        raw = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(problem=f"the body is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise InvalidRequest(problem="the body is not a JSON object")
    return cast("JsonObject", raw)


def _check_messages(messages: object) -> None:
    """Check the names inside each message; types and counts are the schema's business."""
    entries = cast("list[object]", messages) if isinstance(messages, list) else []
    for index, entry in enumerate(entries):
        if isinstance(entry, dict):
            message = cast("JsonObject", entry)
            prefix = f"messages[{index}]."
            _check_names(message, _MESSAGE_FIELDS, _MESSAGE_NEUTRAL, prefix=prefix)
            _check_content(message, prefix)


def _check_content(message: JsonObject, prefix: str) -> None:
    content = message.get("content")
    # Only an assistant turn may be empty: it can consist of tool calls alone.
    if content is None and message.get("role") != "assistant":
        param = f"{prefix}content"
        raise InvalidRequest(problem=f"`{param}` is missing or null", param=param)
    parts = cast("list[object]", content) if isinstance(content, list) else []
    for index, part in enumerate(parts):
        kind = cast("JsonObject", part).get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            param = f"{prefix}content[{index}].type"
            raise UnsupportedParameter(param=param, problem="content is text only")


def _check_names(
    fields: JsonObject,
    known: frozenset[str],
    neutral: Mapping[str, tuple[object, ...]],
    *,
    prefix: str,
) -> None:
    for name, value in fields.items():
        if name in known:
            continue
        if name not in neutral:
            raise UnknownParameter(param=f"{prefix}{name}"[:200])
        if value is not None and not _is_one_of(value, neutral[name]):
            raise UnsupportedParameter(param=f"{prefix}{name}", problem="leave it out")


def _is_one_of(value: object, neutral: tuple[object, ...]) -> bool:
    """Compare with types: JSON's true is no 1."""
    return any(type(value) is type(known) and value == known for known in neutral)


def _check_combinations(request: ChatRequest) -> None:
    if request.stream_options is not None and not request.stream:
        problem = "`stream_options` is allowed only with `stream` set to true"
        raise InvalidRequest(problem=problem, param="stream_options")
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        problem = "`max_tokens` and `max_completion_tokens` differ: send one of them"
        raise InvalidRequest(problem=problem, param="max_tokens")


def _invalid_value(error: msgspec.ValidationError) -> InvalidRequest:
    """Turn ``Expected `int`, got `str` - at `$.seed` `` into a problem with a param."""
    located = _LOCATED.match(str(error))
    if located is None:
        return InvalidRequest(problem=str(error))
    param = located["param"]
    return InvalidRequest(problem=f"invalid `{param}`: {located['problem']}", param=param)
