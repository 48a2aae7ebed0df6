"""A request body to a struct, with errors that name the field at fault."""

from __future__ import annotations

import re
from typing import TypeVar, cast

import msgspec
from msgspec import Struct

from pals.api.openai.fields import FieldTable, JsonObject
from pals.errors import InvalidRequest, UnknownParameter, UnsupportedParameter

RequestT = TypeVar("RequestT", bound=Struct)

UNSUPPORTED_KINDS = {
    "image_url": "content is text only",
    "input_audio": "content is text only",
    "file": "content is text only",
    "custom": "tools are functions",
}
"""Kinds of parts, tools and calls that OpenAI's schema knows and this version does not."""

_LOCATED = re.compile(r"(?P<problem>.*) - at `(?:key in )?\$\.?(?P<place>[^`]*)`", re.DOTALL)
_NAMED = re.compile(r"Object (?:missing required|contains unknown) field `(?P<name>[^`]*)`")
_KIND = re.compile(r"Invalid (?:enum )?value '(?P<kind>.*)'")
_UNKNOWN = "Object contains unknown field"


def read_request(body: bytes, table: FieldTable, kind: type[RequestT]) -> RequestT:
    """Read a request.

    Args:
        body: JSON.
        table: Which fields it may have.
        kind: What to read it as.

    Raises:
        InvalidRequest: It is not JSON, or a value has the wrong type or range.
        UnsupportedParameter: It asks for something that is not implemented.
        UnknownParameter: It has a field that OpenAI's schema does not know.
    """
    fields = _decode_object(body)
    table.check(fields)
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise _problem(str(error)) from None


def _decode_object(body: bytes) -> JsonObject:
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(problem=f"the body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidRequest(problem="the body is not a JSON object")
    return cast("JsonObject", fields)


def _problem(text: str) -> InvalidRequest:
    """Turn ``Expected `int`, got `str` - at `$.seed` `` into a problem with a param."""
    located = _LOCATED.fullmatch(text)
    problem, place = (located["problem"], located["place"]) if located else (text, "")
    if named := _NAMED.match(problem):
        place = f"{place}.{named['name']}".removeprefix(".")
    param = place[:200]
    if problem.startswith(_UNKNOWN):
        return UnknownParameter(param=param)
    kind = _KIND.fullmatch(problem)
    is_of_type = place.rpartition(".")[2] == "type"
    if kind is not None and is_of_type and kind["kind"] in UNSUPPORTED_KINDS:
        return UnsupportedParameter(param=param, problem=UNSUPPORTED_KINDS[kind["kind"]])
    return InvalidRequest(problem=f"invalid `{param}`: {problem}" if param else text, param=param)
