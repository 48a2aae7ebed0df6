"""SHA-256 of large files, each computed once for as long as the file stays as it is."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path

from pals.config import cache_dir, write_private
from pals.models.files import open_regular

SHA256 = re.compile(r"[0-9a-f]{64}")


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a large file in hex, from the cache folder when it is known.

    A name is never believed, also not that of a blob in the hub's cache, which is its hash.

    Args:
        path: A resolved path.

    Raises:
        CorruptModel: It cannot be opened, or is not a regular file.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        status = os.fstat(file.fileno())
        known = _read_sidecar(_sidecar(status))
        if known is not None:
            return known
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if _sidecar(os.fstat(file.fileno())) == _sidecar(status):
            _write_sidecar(_sidecar(status), sha256)
    return sha256


def keep_hash(path: Path, sha256: str) -> None:
    """Remember the hash of a file that was just written; renaming it changes nothing."""
    _write_sidecar(_sidecar(path.stat()), sha256)


def file_stamp(status: os.stat_result) -> list[int]:
    """Return numbers that change when the file does."""
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]


def kept_digest(state: object) -> str | None:
    """Return the SHA-256 in hex that was kept for a state (any JSON value), or None."""
    return _read_sidecar(_sidecar_of(state))


def keep_digest(state: object, sha256: str) -> None:
    """Remember the SHA-256 in hex of what is in this state."""
    _write_sidecar(_sidecar_of(state), sha256)


def _sidecar(status: os.stat_result) -> Path:
    """Return the file that holds the hash for one state of one file."""
    return _sidecar_of(file_stamp(status))


def _sidecar_of(state: object) -> Path:
    return cache_dir() / "hashes" / hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _read_sidecar(sidecar: Path) -> str | None:
    try:
        known = sidecar.read_bytes()[:65].decode(errors="replace")
    except OSError:
        return None
    return known if SHA256.fullmatch(known) else None


def _write_sidecar(sidecar: Path, sha256: str) -> None:
    # a cache that cannot be written costs the next start some time, and nothing else
    with contextlib.suppress(OSError):
        write_private(sidecar, sha256.encode())
