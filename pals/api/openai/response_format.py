"""The form that an answer must have."""

from __future__ import annotations

import msgspec

from pals.api.openai.schema.chat import ChatRequest, JsonObjectFormat, JsonSchemaFormat
from pals.errors import InvalidRequest
from pals.types import MAX_GRAMMAR_BYTES, Grammar


def answer_grammar(request: ChatRequest) -> Grammar | None:
    """Return what an answer may consist of; None for any text.

    Raises:
        InvalidRequest: The schema is too long.
    """
    match request.response_format:
        case JsonObjectFormat():
            return Grammar(kind="json_object")
        case JsonSchemaFormat(json_schema=wanted):
            if wanted.schema is None:
                return Grammar(kind="json_object")
            return Grammar(kind="json_schema", source=_source(wanted.schema))
        case _:
            return None


def _source(schema: dict[str, object]) -> str:
    source = msgspec.json.encode(schema)
    if len(source) > MAX_GRAMMAR_BYTES:
        problem = f"the schema has {len(source)} bytes, at most {MAX_GRAMMAR_BYTES} fit"
        param = "response_format.json_schema.schema"
        raise InvalidRequest(problem=problem, param=param)
    return source.decode()
