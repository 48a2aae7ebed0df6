"""Read the JSON files that come with a tokenizer, none of which is trusted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from pals.errors import CorruptModel
from pals.models.files import parse_json_object, read_file

MAX_SETTINGS_BYTES = 16 << 20

SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


def load_text(path: Path, *, maximum: int) -> str | None:
    """Return the text of a file, or None when there is no such file.

    Raises:
        CorruptModel: It is no regular file, leads out of its folder, has more than
            ``maximum`` bytes, or is not UTF-8.
    """
    if not os.path.lexists(path):
        return None
    raw = read_file(path.parent, path.name, most=maximum)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise CorruptModel(source=path, problem=f"is not UTF-8 at byte {error.start}") from error


def load_settings(path: Path) -> Mapping[str, object]:
    """Return the object in a JSON file; empty when there is no such file.

    Raises:
        CorruptModel: The file is too large or holds something else.
    """
    text = load_text(path, maximum=MAX_SETTINGS_BYTES)
    if text is None:
        return {}
    return parse_json_object(text.encode(), path)


def load_special_tokens(folder: Path) -> dict[str, str]:
    """Return the special tokens by role (``bos_token``, ``eos_token``, …).

    tokenizer_config.json wins over the older special_tokens_map.json; in both a token is
    a string or an object with ``content``.

    Raises:
        CorruptModel: A file does not parse, or a token is something else.
    """
    tokens: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings = load_settings(folder / name)
        for role in SPECIAL_ROLES:
            value = settings.get(role)
            if isinstance(value, dict):
                value = cast("dict[str, object]", value).get("content")
            if isinstance(value, str):
                tokens[role] = value
            elif value is not None:
                raise CorruptModel(source=folder / name, problem=f"`{role}` is not a token")
    return tokens
