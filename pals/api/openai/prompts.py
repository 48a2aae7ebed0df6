"""Prompts and inputs: a text, token ids, or a list of either."""

from __future__ import annotations

from typing import TypeGuard, cast

from pals.driver.interface import Prompt
from pals.errors import InvalidRequest


def read_prompts(value: object, *, param: str, vocab_size: int, limit: int) -> list[Prompt]:
    """Return the prompts of a request, at least one.

    Args:
        value: JSON: a string, a list of strings, a list of token ids, or a list of such lists.
        param: Its field.
        vocab_size: Token ids are below it.
        limit: Most prompts.

    Raises:
        InvalidRequest: It is none of these, or holds nothing, or too much.
    """
    if isinstance(value, str):
        return [value]
    entries = cast("list[object]", value) if isinstance(value, list) else []
    if not entries:
        problem = f"`{param}` is no text, no token ids, and no list of either"
        raise InvalidRequest(problem=problem, param=param)
    if all(type(entry) is int for entry in entries):
        return [_tokens(entries, param, vocab_size)]
    if len(entries) > limit:
        problem = f"`{param}` has {len(entries)} entries, at most {limit} fit"
        raise InvalidRequest(problem=problem, param=param)
    if _are_texts(entries):
        return list(entries)
    return [_tokens(entry, f"{param}[{i}]", vocab_size) for i, entry in enumerate(entries)]


def _are_texts(entries: list[object]) -> TypeGuard[list[str]]:
    return all(isinstance(entry, str) for entry in entries)


def _tokens(value: object, param: str, vocab_size: int) -> tuple[int, ...]:
    ids = cast("list[object]", value) if isinstance(value, list) else []
    known = tuple(i for i in ids if type(i) is int and 0 <= i < vocab_size)
    if not ids or len(known) < len(ids):
        problem = f"`{param}` is no list of token ids below {vocab_size}"
        raise InvalidRequest(problem=problem, param=param)
    return known
