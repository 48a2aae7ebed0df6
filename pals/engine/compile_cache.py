# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""Where XLA keeps compiled programs on disk, and how whole ones come there.

jax writes an entry at the place where it is read, so that a process that ends meanwhile leaves
a part of one. A stage is a folder inside the cache in which programs are compiled over all that
the cache has; what is whole by the end moves into the cache at once.

An entry is a file whose name is that of the program and a hash of all that it depends on.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import jax
from jax.experimental.compilation_cache import compilation_cache

from pals.config import PRIVATE_FILE, PRIVATE_FOLDER, programs_dir

ENTRY_SUFFIX = "-cache"
_USE_SUFFIX = "-atime"
_UNUSED = bytes(8)
_STAGE_PREFIX = ".stage-"
_NO_LIMIT = -1
_HUGE_LIMIT = 1 << 50
"""With a limit, jax notes beside each entry when it was last read or written."""


def programs_folder() -> Path:
    """Return the folder of compiled programs."""
    return programs_dir()


def use_compilation_cache(folder: Path) -> None:
    """Keep every compiled program in ``folder``, however small or quick to compile.

    While a stage of ``folder`` is open, that stays in use.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
    current = _folder_in_use()
    if current is not None and folder in (current, current.parent):
        return
    _use(folder, _NO_LIMIT)


def folder_in_use() -> Path | None:
    """Return the folder in which this process keeps programs, also while a stage of it is open."""
    current = _folder_in_use()
    if current is not None and current.name.startswith(_STAGE_PREFIX):
        return current.parent
    return current


@dataclass(frozen=True, slots=True)
class Stage:
    """A folder in which programs are compiled before they come into the cache.

    Attributes:
        folder: Holds a link to each entry of the cache, and what was compiled since.
    """

    folder: Path

    def entries_used(self) -> list[Path]:
        """Return the entries that were read, or compiled and written whole, by name."""
        notes = self.folder.glob(f"*{_USE_SUFFIX}")
        used = (note for note in notes if note.read_bytes() not in (_UNUSED, b""))
        return sorted(_entry_of(note) for note in used)

    def entries_compiled(self) -> list[Path]:
        """Return those of them that the cache does not have."""
        return [e for e in self.entries_used() if not (self.folder.parent / e.name).exists()]


@contextmanager
def compiling_in_stage(cache: Path) -> Generator[Stage]:
    """Compile in a stage of ``cache``, which gets what is whole at the end, come what may.

    Everything is compiled or read again, also what this process has in memory already, so
    that the stage knows what was used.
    """
    use_compilation_cache(cache)
    with open_stage(cache) as folder:
        for entry in cache.glob(f"*{ENTRY_SUFFIX}"):
            with suppress(OSError):  # another user's, say: compiled again
                os.link(entry, folder / entry.name)
                _note_of(folder / entry.name).write_bytes(_UNUSED)
        stage = Stage(folder)
        jax.clear_caches()
        _use(folder, _HUGE_LIMIT)
        try:
            yield stage
        finally:
            _use(cache, _NO_LIMIT)
            place_all(stage.entries_compiled(), cache)


@contextmanager
def open_stage(cache: Path) -> Generator[Path]:
    """Give an empty folder inside ``cache``, which is gone afterwards.

    Those of processes that were killed are removed, and what they compiled whole is kept.
    """
    cache.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
    for folder in cache.glob(f"{_STAGE_PREFIX}*"):
        with suppress(OSError):  # in use, or gone meanwhile
            _clear_abandoned(folder)
    made = Path(tempfile.mkdtemp(dir=cache, prefix=".new-"))
    handle = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Locked before it has the name by which others look for what was abandoned.
        fcntl.flock(handle, fcntl.LOCK_EX)
        folder = made.rename(cache / made.name.replace(".new-", _STAGE_PREFIX))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)


def place_all(entries: Iterable[Path], cache: Path) -> int:
    """Give ``cache`` all of the entries, or none when that fails.

    Args:
        entries: In a stage of the cache.
        cache: What it has already stays as it is.

    Returns:
        How many it did not have.

    Raises:
        OSError: They cannot be placed.
    """
    placed: list[Path] = []
    try:
        for entry in entries:
            entry.chmod(PRIVATE_FILE)
            with suppress(FileExistsError):
                os.link(entry, cache / entry.name)
                placed.append(cache / entry.name)
    except BaseException:
        for path in placed:
            path.unlink(missing_ok=True)
        raise
    return len(placed)


def _use(folder: Path, limit: int) -> None:
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    jax.config.update("jax_compilation_cache_max_size", limit)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # Otherwise the folder's path is a part of every key, and no entry fits another folder.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    # jax looks at the folder once, at the first compilation of the process.
    compilation_cache.reset_cache()


def _folder_in_use() -> Path | None:
    # jax declares its options at run time, which pyright cannot see.
    option: object = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    current = cast("str | None", option)
    return Path(current) if current else None


def _note_of(entry: Path) -> Path:
    return entry.with_name(entry.name.removesuffix(ENTRY_SUFFIX) + _USE_SUFFIX)


def _entry_of(note: Path) -> Path:
    return note.with_name(note.name.removesuffix(_USE_SUFFIX) + ENTRY_SUFFIX)


def _clear_abandoned(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        place_all(Stage(folder).entries_compiled(), folder.parent)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)
