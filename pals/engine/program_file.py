"""One file of compiled programs, which carries them to machines of the same kind.

::

    magic     16 bytes: the text `pals programs 1` and a line feed
    length    4 bytes, big endian, of the manifest
    sha256    32 bytes, of the manifest
    manifest  JSON, see `Manifest`
    entries   in the order of the manifest, one after the other

Nothing else is in the file, so that the same programs always make the same file. What it holds
is machine code: a digest finds damage, and says nothing of who made it.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec

from pals.config import PRIVATE_FILE
from pals.errors import ProgramsDamaged, ProgramsNotWritten

MAGIC = b"pals programs 1\n"
MAX_MANIFEST_BYTES = 1 << 20
MAX_ENTRIES = 256
MAX_ENTRY_BYTES = 1 << 30
MAX_FILE_BYTES = 8 << 30
_BLOCK_BYTES = 1 << 20
_HEAD = struct.Struct(">16sI32s")

_Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
_Label = Annotated[str, msgspec.Meta(max_length=64)]
_Value = Annotated[str, msgspec.Meta(max_length=16384)]
_Program = Annotated[str, msgspec.Meta(max_length=128)]


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of the cache.

    Attributes:
        name: Its file's; it leads nowhere else than into the folder.
        size_bytes: How many follow the manifest for it.
        sha256: Of these.
    """

    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_]{1,100}-[0-9a-f]{64}-cache\Z")]
    size_bytes: Annotated[int, msgspec.Meta(ge=1, le=MAX_ENTRY_BYTES)]
    sha256: _Sha256


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a file holds.

    Attributes:
        made_for: What has to be the same where the programs are to run, by its name for
            people: the machine, the versions, the shard.
        programs: Names of the shard's programs.
        entries: Their entries in the cache, by name; some programs may share one.
    """

    made_for: Annotated[dict[_Label, _Value], msgspec.Meta(max_length=64)]
    programs: Annotated[tuple[_Program, ...], msgspec.Meta(max_length=MAX_ENTRIES)]
    entries: Annotated[tuple[Entry, ...], msgspec.Meta(min_length=1, max_length=MAX_ENTRIES)]


_manifests = msgspec.json.Decoder(Manifest)


def write_program_file(
    path: Path, made_for: Mapping[str, str], programs: Sequence[str], entries: Sequence[Path]
) -> Manifest:
    """Write entries of the cache to one file, for this user alone, whole or not at all.

    Raises:
        ProgramsNotWritten: The disk is full, say.
    """
    try:
        ordered = sorted(entries, key=lambda entry: entry.name)
        manifest = Manifest(
            made_for=dict(made_for),
            programs=tuple(programs),
            entries=tuple(map(_describe, ordered)),
        )
        encoded = msgspec.json.encode(manifest)
        head = _HEAD.pack(MAGIC, len(encoded), hashlib.sha256(encoded).digest())
        with _replaced(path) as file:
            file.write(head + encoded)
            for entry in ordered:
                with entry.open("rb") as source:
                    for block in _blocks(source):
                        file.write(block)
    except OSError as error:
        raise ProgramsNotWritten(path=path, problem=error.strerror or error) from error
    return manifest


@dataclass(frozen=True, slots=True)
class ProgramFile:
    """An open file of programs, whose entries were not read yet.

    Attributes:
        manifest: What it says that it holds; the digests of the entries are to be checked.
    """

    manifest: Manifest
    _path: Path
    _file: BinaryIO

    def extract(self, folder: Path) -> list[Path]:
        """Write every entry into ``folder``, for this user alone.

        Call it once.

        Raises:
            ProgramsDamaged: An entry is not what the manifest says; some are written.
            OSError: They cannot be written.
        """
        paths: list[Path] = []
        for entry in self.manifest.entries:
            path = folder / entry.name
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FILE)
            with os.fdopen(handle, "wb") as target:
                self._copy(entry, target.write)
                target.flush()
                os.fsync(target.fileno())
            paths.append(path)
        return paths

    def _copy(self, entry: Entry, write: Callable[[bytes], object]) -> None:
        digest, left = hashlib.sha256(), entry.size_bytes
        while left and (block := self._file.read(min(left, _BLOCK_BYTES))):
            digest.update(block)
            write(block)
            left -= len(block)
        if left or digest.hexdigest() != entry.sha256:
            raise ProgramsDamaged(file=self._path, problem=f"{entry.name} is not as it was written")


@contextmanager
def open_program_file(path: Path) -> Generator[ProgramFile]:
    """Open a file of programs and read its manifest.

    Raises:
        ProgramsDamaged: It is no such file, or a part of one.
    """
    if not path.is_file():
        raise ProgramsDamaged(file=path, problem="there is no such file")
    with path.open("rb") as file:
        yield ProgramFile(_read_manifest(path, file), path, file)


def _read_manifest(path: Path, file: BinaryIO) -> Manifest:
    size = os.fstat(file.fileno()).st_size
    if size > MAX_FILE_BYTES:
        raise ProgramsDamaged(
            file=path, problem=f"{size} bytes, more than the {MAX_FILE_BYTES} there may be"
        )
    head = file.read(_HEAD.size)
    if not head.startswith(MAGIC):
        raise ProgramsDamaged(file=path, problem="it does not begin like a file of programs")
    if len(head) < _HEAD.size:
        raise ProgramsDamaged(file=path, problem=f"it ends after {size} bytes")
    _, length, sha256 = _HEAD.unpack(head)
    encoded = file.read(min(length, MAX_MANIFEST_BYTES))
    if len(encoded) != length or hashlib.sha256(encoded).digest() != sha256:
        raise ProgramsDamaged(file=path, problem="its list of programs is damaged")
    try:
        manifest = _manifests.decode(encoded)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProgramsDamaged(file=path, problem=str(error)) from error
    _check_entries(path, manifest, size - _HEAD.size - length)
    return manifest


def _check_entries(path: Path, manifest: Manifest, following_bytes: int) -> None:
    names = [entry.name for entry in manifest.entries]
    if names != sorted(set(names)):
        raise ProgramsDamaged(file=path, problem="its entries are not in order")
    listed_bytes = sum(entry.size_bytes for entry in manifest.entries)
    if listed_bytes != following_bytes:
        problem = f"{following_bytes} bytes of programs are there and {listed_bytes} are listed"
        raise ProgramsDamaged(file=path, problem=problem)


def _describe(entry: Path) -> Entry:
    with entry.open("rb") as file:
        digest, size = hashlib.sha256(), 0
        for block in _blocks(file):
            digest.update(block)
            size += len(block)
    return Entry(name=entry.name, size_bytes=size, sha256=digest.hexdigest())


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(_BLOCK_BYTES):
        yield block


@contextmanager
def _replaced(path: Path) -> Generator[BinaryIO]:
    """Give a file that takes the place of ``path`` once all of it is written."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)
