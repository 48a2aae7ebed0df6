"""OpenAI's own OpenAPI file, cut down to what is served, and made to mean what it says.

The file calls itself 3.1, where ``nullable`` means nothing, and is written as if for 3.0. It
documents no errors: each operation gets its `ErrorResponse`. Its requests may have any fields
more, which an endpoint that drops no option silently has to refuse.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

from tests.openai_schema import Schema, component, path_item

SERVED: Mapping[str, str] = {
    "/chat/completions": "post",
    "/completions": "post",
    "/models": "get",
    "/models/{model}": "get",
    "/embeddings": "post",
}
REQUESTS = ("CreateChatCompletionRequest", "CreateCompletionRequest", "CreateEmbeddingRequest")

_REFERENCE = "#/components/schemas/"
_UNREAD = ("description", "example", "examples", "default", "nullable", "discriminator")


def document(
    model: str,
    *,
    without: Mapping[str, Collection[str]] | None = None,
    narrowed: Mapping[str, Schema] | None = None,
) -> Schema:
    """Return the document of an endpoint that serves one model.

    Args:
        model: The only value of ``model`` in requests.
        without: Fields that requests do not have, by the component of the request.
        narrowed: Fields that have another schema than the file's, by the component.
    """
    paths, components = _parts()
    absent, others = without or {}, narrowed or {}
    requests = {name: _request(components[name], model, absent.get(name, ())) for name in REQUESTS}
    for name, fields in others.items():
        requests[name]["properties"] |= fields
    return {
        "openapi": "3.1.0",
        "info": {"title": "the served part of OpenAI's API", "version": "1"},
        "paths": paths,
        "components": {"schemas": components | requests},
    }


@cache
def _parts() -> tuple[Schema, Schema]:
    """Return the served paths and every component that they lead to."""
    paths = {path: {method: _operation(path, method)} for path, method in SERVED.items()}
    components: Schema = {}
    waiting = _references(paths)
    while waiting:
        name = waiting.pop()
        components[name] = _normal(component(name))
        waiting |= _references(components[name]) - components.keys()
    # The file forgets what `encoding_format` does.
    vector = components["Embedding"]["properties"]
    vector["embedding"] = {"anyOf": [vector["embedding"], {"type": "string", "format": "byte"}]}
    return paths, components


def _operation(path: str, method: str) -> Schema:
    operation = _normal(path_item(path)[method])
    error = {"application/json": {"schema": {"$ref": f"{_REFERENCE}ErrorResponse"}}}
    operation["responses"]["4XX"] = {"description": "refused", "content": error}
    return operation


def _references(part: Any) -> set[str]:
    if isinstance(part, list):
        return set().union(*map(_references, part))
    if not isinstance(part, dict):
        return set()
    found = set().union(*map(_references, part.values()))
    if isinstance(name := part.get("$ref"), str):
        found.add(name.removeprefix(_REFERENCE))
    return found


def _normal(part: Any, *, is_table: bool = False) -> Any:
    """Return a schema without prose and ``nullable``; the keys of a table are names."""
    if isinstance(part, list):
        return [_normal(each) for each in part]
    if not isinstance(part, dict):
        return part
    if is_table:
        return {name: _normal(each) for name, each in part.items()}
    kept = {
        key: _normal(value, is_table=key in ("properties", "responses"))
        for key, value in part.items()
        if key not in _UNREAD and not key.startswith("x-")
    }
    if "content" in kept:  # a response, which has to have one
        kept.setdefault("description", "")
    return {"anyOf": [kept, {"type": "null"}]} if part.get("nullable") is True else kept


def _request(schema: Schema, model: str, absent: Collection[str]) -> Schema:
    """Return a request of one model, as one object instead of parts that are put together."""
    fields: Schema = {}
    required: set[str] = set()
    for part in _flat(schema):
        fields |= part.get("properties", {})
        required.update(part.get("required", ()))
    fields["model"] = {"type": "string", "enum": [model]}
    return {
        "type": "object",
        "properties": {name: part for name, part in fields.items() if name not in absent},
        "required": sorted(required),
        "additionalProperties": False,
    }


def _flat(schema: Schema) -> list[Schema]:
    if "$ref" in schema:
        return _flat(_parts()[1][schema["$ref"].removeprefix(_REFERENCE)])
    return [part for each in schema.get("allOf", []) for part in _flat(each)] + [schema]
