"""Reads files of a model folder, none of which is trusted."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from pals.errors import CorruptModel

MAX_CONFIG_BYTES = 1 << 20
MAX_INDEX_BYTES = 1 << 25
MAX_JSON_TABLES = 1 << 20
"""Objects and lists in one file. A list takes 30 times the memory of its two characters."""

_SHARED_BLOB = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


def contained_path(folder: Path, name: str) -> Path:
    """Return the real path of a file in ``folder``, which need not exist.

    A link may lead to the ``blobs`` folder of the hub's own cache layout and nowhere else:
    that of the model, or the one that all models of the cache share.

    Raises:
        CorruptModel: ``name`` is not a plain file name, or leads out of the folder.
    """
    if not _FILE_NAME.fullmatch(name):
        raise CorruptModel(source=folder, problem=f"{name[:200]!r} is not a plain file name")
    real_folder = folder.resolve()
    try:
        real = (folder / name).resolve()
    except (OSError, RuntimeError) as error:  # the latter of Python 3.11 and 3.12
        raise CorruptModel(source=folder / name, problem="it is a link to itself") from error
    allowed = {real_folder}
    if real_folder.parent.name == "snapshots":
        allowed.add(real_folder.parents[1] / "blobs")
        if _SHARED_BLOB.fullmatch(real.name):
            allowed.add(real_folder.parents[2] / "blobs" / real.name[:2])
    if real.parent not in allowed:
        raise CorruptModel(source=folder / name, problem="it is a link out of the model's folder")
    return real


def open_regular(path: Path) -> int:
    """Open a resolved path for reading and return its descriptor.

    Raises:
        CorruptModel: It cannot be opened, or is not a regular file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise CorruptModel(source=path, problem=error.strerror or "cannot be opened") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise CorruptModel(source=path, problem="it is not a regular file")
    return handle


def read_file(folder: Path, name: str, *, most: int) -> bytes:
    """Return a whole file of at most ``most`` bytes.

    Raises:
        CorruptModel: It is missing, too large, or leads out of the folder.
    """
    path = contained_path(folder, name)
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise CorruptModel(source=path, problem=f"it is larger than {most} bytes")
    return data


def parse_json_object(data: bytes, source: Path) -> dict[str, object]:
    """Parse a JSON object whose keys are all different.

    Raises:
        CorruptModel: ``data`` is something else.
    """
    tables = data.count(b"{") + data.count(b"[")
    if tables > MAX_JSON_TABLES:
        raise CorruptModel(source=source, problem=f"not valid JSON here: {tables} tables")
    try:
        value = json.loads(data, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CorruptModel(source=source, problem=f"not valid JSON: {error}") from error
    return json_object(value, source)


def json_object(value: object, source: Path) -> dict[str, object]:
    """Return ``value`` as a JSON object.

    Raises:
        CorruptModel: It is not one.
    """
    if not isinstance(value, Mapping):
        raise CorruptModel(source=source, problem="a JSON object was expected")
    return dict(cast("Mapping[str, object]", value))


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return values
