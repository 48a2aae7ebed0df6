from pathlib import Path

import pytest

from pals.errors import CorruptModel
from pals.models.files import contained_path

SHARED = "ab" + "0" * 62


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    folder = tmp_path / "hub" / "models--org--tiny" / "snapshots" / "c0ffee"
    folder.mkdir(parents=True)
    return folder


def link(snapshot: Path, target: str) -> Path:
    """Make ``config.json`` a link to a file that exists at a place in the hub's cache."""
    file = snapshot.parents[2] / target
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{}")
    (snapshot / "config.json").symlink_to(file)
    return file.resolve()


@pytest.mark.parametrize("target", ["models--org--tiny/blobs/1234", f"blobs/ab/{SHARED}"])
def test_a_link_into_the_blobs_of_the_hub_s_cache_is_followed(snapshot: Path, target: str):
    file = link(snapshot, target)
    assert contained_path(snapshot, "config.json") == file


@pytest.mark.parametrize(
    "target",
    [
        "models--other--one/blobs/1234",
        "models--org--tiny/pals/x",
        "blobs/ab/secret",
        f"blobs/cd/{SHARED}",
        f"blobs/{SHARED}",
        f"elsewhere/ab/{SHARED}",
        "../outside",
    ],
)
def test_a_link_to_anywhere_else_is_refused(snapshot: Path, target: str):
    link(snapshot, target)
    with pytest.raises(CorruptModel, match="link out of"):
        contained_path(snapshot, "config.json")


def test_a_plain_folder_has_no_blobs(tmp_path: Path):
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True)
    link(folder, f"blobs/ab/{SHARED}")
    with pytest.raises(CorruptModel, match="link out of"):
        contained_path(folder, "config.json")
