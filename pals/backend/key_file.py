"""The key with which a backend signs how new its list is; a file, never in the database."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from pals.config import create_private, read_private
from pals.errors import InvalidConfig
from pals.swarm.identity import Identity


def load_or_create_key(path: Path) -> Identity:
    """Return the key in ``path`` (PEM, 0600), made on the first call.

    Raises:
        ProfileExposed: Others can read the file.
        InvalidConfig: It is not an Ed25519 key, or cannot be written; a file that is there
            is never overwritten.
    """
    try:
        if not path.exists():
            # Another backend that starts at this moment may already use its own.
            with suppress(FileExistsError):
                create_private(path, Identity.generate().to_pem())
        return Identity.from_pem(read_private(path))
    except (OSError, ValueError) as error:
        raise InvalidConfig(
            source=path,
            problem=str(error),
            advice="restore it from a backup, or choose another with `--key-file`",
        ) from error
