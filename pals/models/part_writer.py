"""Writes one part of a weight file, from where an earlier attempt ended."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from pals.models.safetensors import TensorEntry, read_header
from pals.models.store import READ_BYTES, StoredPart, part_head


class PartWriter:
    """Takes the bytes of a part's tensors in order, and hashes each tensor on the way.

    What arrived stays in ``.partial`` when the download ends early, and counts as nothing
    until `finish` gave it its name.
    """

    def __init__(self, path: Path, tensors: Sequence[TensorEntry]) -> None:
        self.path = path
        self._tensors = tensors
        self._head = part_head(tensors)
        self._hashes = _TensorHashes(tensors)
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        self._file = os.fdopen(os.open(partial_path(path), flags, 0o666), "r+b", READ_BYTES)

    def __enter__(self) -> Self:
        if self._file.read(len(self._head)) != self._head:
            self._file.seek(0)
            self._file.truncate()
            self._file.write(self._head)
        while block := self._file.read(min(READ_BYTES, self.missing_bytes)):
            self._hashes.update(block)
        self._file.truncate()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    @property
    def missing_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self._tensors) - self._hashes.done_bytes

    def missing_ranges(self) -> list[tuple[int, int]]:
        """Return the byte ranges ``[start, stop)`` of the weight file still to be written."""
        skipped = self._hashes.done_bytes
        ranges: list[tuple[int, int]] = []
        for entry in self._tensors:
            done = min(skipped, entry.size_bytes)
            skipped -= done
            start, stop = entry.offset + done, entry.offset + entry.size_bytes
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], stop)
            elif start < stop:
                ranges.append((start, stop))
        return ranges

    def write(self, block: bytes) -> None:
        """Append the next bytes."""
        self._file.write(block)
        self._hashes.update(block)

    def finish(self) -> None:
        """Give the part its name; every byte must have been written."""
        assert not self.missing_bytes
        self._file.flush()
        os.fsync(self._file.fileno())
        partial_path(self.path).replace(self.path)
        StoredPart(
            path=self.path, entries=read_header(self.path), hashes=self._hashes.digests()
        ).keep_state()


def partial_path(path: Path) -> Path:
    """Return where a part is written while it is not whole."""
    return path.with_suffix(".partial")


def kept_bytes(path: Path, tensors: Sequence[TensorEntry]) -> int:
    """Return how many bytes of the tensors an earlier attempt left, at most."""
    try:
        left = partial_path(path).stat().st_size - len(part_head(tensors))
    except OSError:
        return 0
    return min(max(0, left), sum(entry.size_bytes for entry in tensors))


class _TensorHashes:
    """Hashes a stream of tensors, each on its own."""

    def __init__(self, tensors: Sequence[TensorEntry]) -> None:
        self.done_bytes = 0
        self._digests = {entry.name: hashlib.sha256() for entry in tensors}
        self._open = self._spans(tensors)
        self._name, self._left = next(self._open, ("", 0))

    @staticmethod
    def _spans(tensors: Sequence[TensorEntry]) -> Iterator[tuple[str, int]]:
        return ((entry.name, entry.size_bytes) for entry in tensors if entry.size_bytes)

    def update(self, block: bytes) -> None:
        rest = memoryview(block)
        self.done_bytes += len(rest)
        while rest:
            here, rest = rest[: self._left], rest[self._left :]
            self._digests[self._name].update(here)
            self._left -= len(here)
            if not self._left:
                self._name, self._left = next(self._open, ("", 0))

    def digests(self) -> dict[str, str]:
        return {name: digest.hexdigest() for name, digest in self._digests.items()}
