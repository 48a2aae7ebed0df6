"""The downloaded parts of weight files, in the model's folder of the hub's cache.

Of a weight file that a shard needs only in part, each part (`pals.models.parts`) is kept
as a small safetensors file::

    models--org--name/pals/manifests/<commit>.json     the weight files of a revision
                           weights/<sha256>/header     the head of that weight file
                                            file.lock
                                            layer-00003.safetensors
                                            layer-00003.json     its hashes and its state
                                            layer-00003.partial  while it is fetched
                                            layer-00003.lock

The name of a folder is the hash of the whole weight file, so that revisions share what
did not change. A part without its ``.json`` is not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import cast

from pals.errors import CorruptModel, ModelNotFound
from pals.models.files import (
    MAX_INDEX_BYTES,
    contained_path,
    open_regular,
    parse_json_object,
    read_file,
)
from pals.models.hashes import SHA256
from pals.models.listing import ListedFile, Listing
from pals.models.parts import part_of
from pals.models.safetensors import (
    INDEX_NAME,
    MAX_HEADER_BYTES,
    SINGLE_NAME,
    TensorEntry,
    WeightFiles,
    Weights,
    check_header_size,
    parse_header,
    read_header,
    read_index,
)

STORE_NAME = "pals"
READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class WeightStore:
    """The parts of one hub model; ``folder`` is ``models--org--name/pals``."""

    folder: Path

    @classmethod
    def of(cls, snapshot: Path) -> WeightStore | None:
        """Return the store of a snapshot folder of the hub's cache, None of another folder."""
        model = snapshot.absolute().parent.parent
        in_cache = snapshot.absolute().parent.name == "snapshots"
        return cls(model / STORE_NAME) if in_cache and model.name.startswith("models--") else None

    # --- the weight files of a revision ----------------------------------------------

    def read_listing(self, commit: str) -> Listing | None:
        """Return the kept list of a revision's weight files, None where none is kept.

        Raises:
            CorruptModel: It is malformed.
        """
        path = self._listing_path(commit)
        if not path.is_file():
            return None
        data = read_file(path.parent, path.name, most=MAX_INDEX_BYTES)
        return Listing.parse(parse_json_object(data, path), path)

    def keep_listing(self, commit: str, listing: Listing) -> None:
        replace_file(self._listing_path(commit), listing.to_json())

    def _listing_path(self, commit: str) -> Path:
        return self.folder / "manifests" / f"{commit}.json"

    # --- the head of a weight file ---------------------------------------------------

    def file_folder(self, file: ListedFile) -> Path:
        return self.folder / "weights" / file.sha256

    def read_source(self, file: ListedFile) -> dict[str, TensorEntry] | None:
        """Return where tensors stand in the file on the hub, None where its head is not kept.

        Raises:
            CorruptModel: The head is malformed.
        """
        folder = self.file_folder(file)
        if not (folder / "header").is_file():
            return None
        data = read_file(folder, "header", most=8 + MAX_HEADER_BYTES)
        return parse_source(data, folder / "header", file.size_bytes)

    def is_in_parts(self, file: ListedFile) -> bool:
        """Return whether the weight file is fetched by parts on this machine, not whole."""
        return (self.file_folder(file) / "header").is_file()

    def keep_source(self, file: ListedFile, head: bytes) -> None:
        """Keep the head of a weight file: the length and the JSON table."""
        replace_file(self.file_folder(file) / "header", head)

    # --- parts -----------------------------------------------------------------------

    def part_path(self, file: ListedFile, part: str, suffix: str = ".safetensors") -> Path:
        return self.file_folder(file) / f"{part}{suffix}"

    def read_part(
        self, file: ListedFile, part: str, tensors: Iterable[TensorEntry]
    ) -> StoredPart | None:
        """Return a part that is wholly here and as it was when it was fetched, else None.

        Its bytes are hashed again only where the file's size or time changed.

        Args:
            file: The weight file.
            part: A name of `pals.models.parts`.
            tensors: The tensors of that part, as the weight file has them.
        """
        path = self.part_path(file, part)
        state = _read_state(path.with_suffix(".json"))
        if state is None or not path.is_file():
            return None
        try:
            entries = read_header(path)
        except CorruptModel:
            return None
        stored = StoredPart(path=path, entries=entries, hashes=state.hashes)
        if _forms(entries.values()) != _forms(tensors) or entries.keys() != state.hashes.keys():
            return None
        if state.stamp != _stamp(path):
            if stored.damaged():
                return None
            stored.keep_state()
        return stored


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPart:
    """A part on this machine: where its tensors stand, and their hashes in hex."""

    path: Path
    entries: Mapping[str, TensorEntry]
    hashes: Mapping[str, str]

    def damaged(self) -> list[str]:
        """Return the tensors whose bytes are not what was fetched; reads all of them."""
        return sorted(
            name for name, entry in self.entries.items() if hash_tensor(entry) != self.hashes[name]
        )

    def keep_state(self) -> None:
        """Write the hashes beside the part; from then on it counts as whole."""
        size_bytes, mtime_ns = _stamp(self.path)
        state = {"size": size_bytes, "mtime_ns": mtime_ns, "tensors": dict(self.hashes)}
        replace_file(self.path.with_suffix(".json"), json.dumps(state, sort_keys=True).encode())

    def discard(self) -> None:
        """Let the part count as missing, so that it is fetched again."""
        self.path.with_suffix(".json").unlink(missing_ok=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeights:
    """The weights of a snapshot in the hub's cache: whole files and downloaded parts."""

    folder: Path
    file_of: Mapping[str, str]
    store: WeightStore
    listing: Listing

    def entries(self, names: Iterable[str]) -> dict[str, TensorEntry]:
        """Return where the named tensors stand; a whole file goes before its parts.

        Raises:
            CorruptModel: A file is malformed, or lacks a tensor of the index.
            ModelNotFound: A tensor was not downloaded.
        """
        wanted = set(names)
        whole = {name for name in wanted if has_file(self.folder, self.file_of[name])}
        found = WeightFiles(self.folder, MappingProxyType(dict(self.file_of))).entries(whole)
        for stored in self._parts(wanted - whole):
            found |= stored.entries
        missing = sorted(wanted - found.keys())
        if missing:
            problem = f"weight `{missing[0]}` was not downloaded ({len(missing)} are missing)"
            raise ModelNotFound(model=_model_id(self.folder), problem=problem)
        return {name: found[name] for name in wanted}

    def known_hashes(self, names: Iterable[str]) -> dict[str, str]:
        """Return the hashes of the tensors that were fetched by parts."""
        wanted = {name for name in names if not has_file(self.folder, self.file_of[name])}
        known: dict[str, str] = {}
        for stored in self._parts(wanted):
            known |= stored.hashes
        return {name: known[name] for name in wanted & known.keys()}

    def _parts(self, names: set[str]) -> list[StoredPart]:
        """Return the parts on this machine that hold any of ``names``."""
        found: list[StoredPart] = []
        for file_name in sorted({self.file_of[name] for name in names}):
            file = self.listing.files[file_name]
            tensors = tensors_by_part(self.store.read_source(file) or {})
            here = {part_of(name) for name in names if self.file_of[name] == file_name}
            for part in sorted(here & tensors.keys(), key=str):
                stored = self.store.read_part(file, str(part), tensors[str(part)])
                if stored is not None:
                    found.append(stored)
        return found


def open_weights(folder: Path) -> Weights:
    """Open the weights of a model's folder, whatever of them is on this machine.

    Raises:
        CorruptModel: There are no weights, or the index or a header is malformed.
        ModelNotFound: Nothing says which tensors the model has.
    """
    store = WeightStore.of(folder)
    listing = None if store is None else store.read_listing(folder.name)
    if store is None or listing is None:
        return WeightFiles.open(folder)
    file_of = _file_of(folder, store, listing)
    unlisted = sorted(set(file_of.values()) - listing.files.keys())
    if unlisted:
        problem = f"`{unlisted[0]}` is in the model's index but not in the list of its files"
        raise CorruptModel(source=folder, problem=problem)
    return StoredWeights(folder=folder, file_of=file_of, store=store, listing=listing)


def _file_of(folder: Path, store: WeightStore, listing: Listing) -> Mapping[str, str]:
    if (folder / INDEX_NAME).is_file():
        return read_index(folder)
    if has_file(folder, SINGLE_NAME):
        return WeightFiles.open(folder).file_of
    single = listing.files.get(SINGLE_NAME)
    source = None if single is None else store.read_source(single)
    if source is None:
        raise ModelNotFound(model=_model_id(folder), problem="none of its weights is downloaded")
    return dict.fromkeys(source, SINGLE_NAME)


def _model_id(snapshot: Path) -> str:
    name = snapshot.absolute().parent.parent.name
    return name.removeprefix("models--").replace("--", "/")


def has_file(folder: Path, name: str) -> bool:
    """Return whether the whole file is in the folder.

    Raises:
        CorruptModel: It leads out of the folder.
    """
    return contained_path(folder, name).is_file()


# --- heads and tensors ---------------------------------------------------------------


def parse_source(data: bytes, path: Path, file_bytes: int) -> dict[str, TensorEntry]:
    """Return the tensors that the head of a file of ``file_bytes`` bytes names.

    Raises:
        CorruptModel: It is malformed, or not what a file of that size can begin with.
    """
    header_bytes = check_header_size(data[:8], path, file_bytes)
    if len(data) != 8 + header_bytes:
        problem = f"it has {len(data)} bytes instead of {8 + header_bytes}"
        raise CorruptModel(source=path, problem=problem)
    return parse_header(data[8:], path, file_bytes)


def tensors_by_part(tensors: Mapping[str, TensorEntry]) -> dict[str, list[TensorEntry]]:
    """Return the tensors of each part in the order in which they stand in the file."""
    parts: dict[str, list[TensorEntry]] = {}
    for entry in sorted(tensors.values(), key=lambda entry: (entry.offset, entry.size_bytes)):
        part = part_of(entry.name)
        if part is not None:
            parts.setdefault(part, []).append(entry)
    return parts


def part_head(tensors: Iterable[TensorEntry]) -> bytes:
    """Return the head of a safetensors file that holds these tensors one after another."""
    table: dict[str, object] = {}
    end = 0
    for entry in tensors:
        offsets = [end, end + entry.size_bytes]
        table[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
        end += entry.size_bytes
    encoded = json.dumps(table, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def hash_tensor(entry: TensorEntry) -> str:
    """Return the SHA-256 in hex of a tensor's bytes.

    Raises:
        CorruptModel: The file became shorter, or cannot be opened.
    """
    digest = hashlib.sha256()
    with os.fdopen(open_regular(entry.path), "rb") as file:
        file.seek(entry.offset)
        left = entry.size_bytes
        while left > 0:
            block = file.read(min(left, READ_BYTES))
            if not block:
                raise CorruptModel(source=entry.path, problem="it became shorter")
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def _forms(tensors: Iterable[TensorEntry]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {entry.name: (entry.dtype, entry.shape) for entry in tensors}


# --- small files ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _State:
    """What is kept beside a part: its size and time when it was whole, and its hashes."""

    stamp: tuple[int, int]
    hashes: Mapping[str, str]


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _read_state(path: Path) -> _State | None:
    if not path.is_file():
        return None
    try:
        values = parse_json_object(read_file(path.parent, path.name, most=MAX_INDEX_BYTES), path)
    except CorruptModel:
        return None
    size_bytes, mtime_ns, tensors = (values.get(key) for key in ("size", "mtime_ns", "tensors"))
    if not isinstance(size_bytes, int) or not isinstance(mtime_ns, int):
        return None
    if not isinstance(tensors, dict):
        return None
    hashes = {name: str(value) for name, value in cast("dict[str, object]", tensors).items()}
    if not all(SHA256.fullmatch(value) for value in hashes.values()):
        return None
    return _State((size_bytes, mtime_ns), hashes)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, with the rights that the hub's cache has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
