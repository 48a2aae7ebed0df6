"""Reads a model's files again and says which are damaged."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from pals.errors import CorruptModel
from pals.models.files import contained_path, open_regular
from pals.models.hashes import SHA256
from pals.models.listing import ListedFile
from pals.models.snapshot import read_listing, weight_names
from pals.models.store import WeightStore, has_file, tensors_by_part

GIT_HASH = re.compile(r"[0-9a-f]{40}")


def damaged_files(folder: Path) -> list[str]:
    """Read every byte of a model's folder and return what is not as it should be.

    A damaged part of a hub model counts as missing from then on, so that the next
    download fetches it again; nothing else is changed.

    Raises:
        CorruptModel: The index or the kept list is malformed.
    """
    damaged = [name for name in _text_names(folder) if _text_is_damaged(folder / name)]
    listing = read_listing(folder)
    store = WeightStore.of(folder)
    for file in () if listing is None else listing.files.values():
        if has_file(folder, file.name):
            if _sha256_of(contained_path(folder, file.name)) != file.sha256:
                damaged.append(file.name)
        elif store is not None:
            damaged += _damaged_parts(store, file)
        elif file.sha256:
            damaged.append(f"{file.name} (missing)")
    return damaged


def _damaged_parts(store: WeightStore, file: ListedFile) -> Iterator[str]:
    try:
        source = store.read_source(file)
    except CorruptModel:
        yield f"{file.name}: header"
        return
    for part, tensors in sorted(tensors_by_part(source or {}).items()):
        if not store.part_path(file, part).is_file():
            continue
        stored = store.read_part(file, part, tensors)
        damaged = [] if stored is None else stored.damaged()
        if stored is None:
            yield f"{file.name}: {part}"
        elif damaged:
            stored.discard()
            yield f"{file.name}: {part} ({', '.join(damaged[:4])})"


def _text_names(folder: Path) -> list[str]:
    """Return the files of a snapshot whose blob is named by its own hash."""
    if WeightStore.of(folder) is None:
        return []
    weights = weight_names(folder)
    return sorted(path.name for path in folder.iterdir() if path.name not in weights)


def _text_is_damaged(path: Path) -> bool:
    """Compare a small file with the name of its blob: a git hash, or a SHA-256."""
    if not path.is_symlink():
        return False
    name = path.readlink().name
    if SHA256.fullmatch(name):
        return _sha256_of(path.resolve()) != name
    if not GIT_HASH.fullmatch(name):
        return False
    data = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
    return blob.hexdigest() != name


def _sha256_of(path: Path) -> str:
    with os.fdopen(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
