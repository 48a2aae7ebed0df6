from __future__ import annotations

import stat
from pathlib import Path

import pytest

from pals.backend.key_file import load_or_create_key
from pals.errors import InvalidConfig, PalsError, ProfileExposed


def test_key_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "data" / "backend.key"
    key = load_or_create_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_or_create_key(path).public_key == key.public_key


def test_exposed_or_damaged_key_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "backend.key"
    load_or_create_key(path)
    path.chmod(0o644)
    with pytest.raises(ProfileExposed):
        load_or_create_key(path)
    path.write_bytes(b"no key")
    path.chmod(0o600)
    with pytest.raises(InvalidConfig):
        load_or_create_key(path)
    assert path.read_bytes() == b"no key"


def test_link_is_not_followed(tmp_path: Path) -> None:
    elsewhere, path = tmp_path / "elsewhere.key", tmp_path / "backend.key"
    load_or_create_key(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(PalsError):
        load_or_create_key(path)


def test_folder_that_cannot_be_written_is_named() -> None:
    with pytest.raises(InvalidConfig, match="/proc/nowhere"):
        load_or_create_key(Path("/proc/nowhere/backend.key"))
