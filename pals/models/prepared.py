"""Layers that were quantised before, kept as Orbax checkpoints in the cache folder.

One checkpoint for each layer and for each end of the model, so that a range that moves
prepares only what it did not hold. What is here is this machine's own work: a checkpoint
that is damaged is deleted and made again from the model's files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
from filelock import FileLock

from pals.config import PRIVATE_FOLDER, cache_dir
from pals.models.array_store import Shapes, load_arrays, save_arrays
from pals.models.hashes import SHA256, hash_file

LAYOUT = 1
"""Raised when the same numbers are held in arrays of other shapes."""

LOCK_DEADLINE_S = 600.0
FREE_MARGIN_BYTES = 1 << 30
ARRAYS = "arrays"
ARRAYS_HASH = "arrays.sha256"
SOURCE_HASH = "source.sha256"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedLayers:
    """The prepared parts of one model in one kind of numbers.

    A part is a layer (``layer-00007``) or an end of the model (``embed_tokens``).
    """

    folder: Path

    @classmethod
    def open(cls, manifest: bytes, kind: str) -> PreparedLayers:
        """Return the parts of a model, of which there may be none yet.

        Args:
            manifest: Names the model's files.
            kind: Dtype and whatever else decides the numbers, fit for a folder's name.
        """
        return cls(cache_dir() / "prepared" / manifest.hex() / f"{kind}-layout{LAYOUT}")

    def load(self, part: str, shapes: Shapes) -> list[jax.Array] | None:
        """Return the arrays of a part on the default device, or None where it is not kept.

        Args:
            part: Name of the part.
            shapes: Shape and dtype of each array, in the order of the result.
        """
        folder = self.folder / part
        if not folder.is_dir():
            return None
        try:
            return _restore(folder, shapes)
        except Exception as error:  # whatever a damaged checkpoint raises: it is made again
            _log.warning("%s is damaged and is prepared again: %s", folder, error)
            self.remove(part)
            return None

    def save(
        self,
        part: str,
        arrays: Mapping[str, jax.Array],
        *,
        source_hash: bytes | None = None,
    ) -> None:
        """Keep a part; one that is kept already stays.

        The part appears whole or not at all. What keeps it from being written, such as a
        full disk, costs only the next start.

        Args:
            part: Name of the part.
            arrays: Of the part, by name.
            source_hash: SHA-256 of the source bytes of a layer.
        """
        target, work = self.folder / part, self.folder / f".{part}.new"
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
            with FileLock(self.folder / "lock", timeout=LOCK_DEADLINE_S):
                shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
                if target.is_dir() or not self._has_room(sum(a.nbytes for a in arrays.values())):
                    return
                try:
                    _save(work, arrays, source_hash)
                    work.rename(target)
                finally:
                    shutil.rmtree(work, ignore_errors=True)
        except Exception as error:  # Orbax raises other errors than OSError for a full disk
            _log.warning("%s cannot be kept: %s", target, error)

    def remove(self, part: str) -> None:
        """Forget a part."""
        shutil.rmtree(self.folder / part, ignore_errors=True)

    def read_source_hash(self, part: str) -> bytes | None:
        """Return the hash of a layer's source bytes, where the layer is kept with it."""
        try:
            text = (self.folder / part / SOURCE_HASH).read_text()
        except (OSError, ValueError):
            return None
        return bytes.fromhex(text) if SHA256.fullmatch(text) else None

    def _has_room(self, needed_bytes: int) -> bool:
        free_bytes = shutil.disk_usage(self.folder).free
        if free_bytes >= needed_bytes + FREE_MARGIN_BYTES:
            return True
        _log.warning(
            "prepared layers are not kept: %s has %d MB left", self.folder, free_bytes >> 20
        )
        return False


def _save(folder: Path, arrays: Mapping[str, jax.Array], source_hash: bytes | None) -> None:
    save_arrays(folder / ARRAYS, arrays)
    (folder / ARRAYS_HASH).write_text(hash_files(folder / ARRAYS))
    if source_hash is not None:
        (folder / SOURCE_HASH).write_text(source_hash.hex())


def _restore(folder: Path, shapes: Shapes) -> list[jax.Array]:
    """Return the arrays of a part, having checked its bytes.

    Raises:
        Exception: The part is damaged, in any way that Orbax or this finds.
    """
    if hash_files(folder / ARRAYS) != (folder / ARRAYS_HASH).read_text():
        raise ValueError("its files are not those that were written")
    arrays = load_arrays(folder / ARRAYS, shapes)
    return [arrays[name] for name in shapes]


def hash_files(folder: Path) -> str:
    """Return a SHA-256 over the files of a folder, none of which is read twice unchanged."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = [[str(path.relative_to(folder)), hash_file(path)] for path in files]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
