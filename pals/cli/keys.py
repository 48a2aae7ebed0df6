"""`pals keys`: who may use the endpoint of this machine."""

from __future__ import annotations

import time
from pathlib import Path

from pals import config
from pals.api.key_file import FILE_NAME, create_key, load_keys, revoke_key
from pals.cli import console
from pals.cli.formats import format_moment
from pals.cli.options import ConfigDir, Json


def create(
    name: str,
    /,
    *,
    file: Path | None = None,
    config_dir: ConfigDir = None,
    json: Json = False,
) -> None:
    """Make a key and print it once; only its hash is kept.

    Every `pals serve` of the profile then asks for a key, and takes this one at once.

    Args:
        name: Whose it is, such as `laptop`; it stands in the endpoint's log.
        file: File of keys; `api.keys` in the profile folder when left out.
        config_dir: Profile folder.
        json: Print one JSON document on standard output.
    """
    path = _path(file, config_dir)
    key = create_key(path, name, now=int(time.time()))
    if json:
        console.json({"schema": 1, "name": name, "key": key, "file": str(path)})
        return
    console.out(key)
    console.note(f"key `{name}` is kept as a hash in `{path}`: this is the only time it shows")


def list_keys(
    *,
    file: Path | None = None,
    config_dir: ConfigDir = None,
    json: Json = False,
) -> None:
    """List the keys by their names; the keys themselves are not kept.

    Args:
        file: File of keys; `api.keys` in the profile folder when left out.
        config_dir: Profile folder.
        json: Print one JSON document on standard output.
    """
    path = _path(file, config_dir)
    keys = load_keys(path, missing_ok=file is None)
    if json:
        lines = [{"name": key.name, "created_at": key.created_at} for key in keys]
        console.json({"schema": 1, "keys": lines, "file": str(path)})
        return
    console.table(("name", "created"), [(k.name, format_moment(k.created_at)) for k in keys])


def revoke(
    name: str,
    /,
    *,
    file: Path | None = None,
    config_dir: ConfigDir = None,
    json: Json = False,
) -> None:
    """End a key; a running endpoint refuses it from the next second on.

    Args:
        name: Its name, as `pals keys list` shows it.
        file: File of keys; `api.keys` in the profile folder when left out.
        config_dir: Profile folder.
        json: Print one JSON document on standard output.
    """
    path = _path(file, config_dir)
    revoke_key(path, name)
    if json:
        console.json({"schema": 1, "revoked": name, "file": str(path)})
        return
    console.note(f"key `{name}` is revoked")


def _path(file: Path | None, config_dir: Path | None) -> Path:
    return file or config.config_dir(config_dir) / FILE_NAME
