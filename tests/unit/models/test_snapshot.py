import hashlib
import json
import subprocess
import sys

import pytest

from pals.errors import CorruptModel, ModelNotFound
from pals.models import hashes
from pals.models.snapshot import Snapshot
from tests.checkpoints import make_llama_checkpoint


def write_manifest(folder):
    names = [path.name for path in folder.glob("*.safetensors")]
    files = {
        name: {
            "size": (folder / name).stat().st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in names
    }
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return names


@pytest.mark.parametrize("files", [1, 2])
def test_driver_without_weights_has_the_manifest_of_the_shards(tmp_path, files):
    folder = make_llama_checkpoint(tmp_path / "model", files=files)
    hashed = Snapshot.open(folder, "test/model").manifest

    for name in write_manifest(folder):
        (folder / name).unlink()

    assert Snapshot.open(folder, "test/model").manifest == hashed
    assert len(hashed) == 32


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_manifest_changes_with_each_text_file(tmp_path, name):
    folder = make_llama_checkpoint(tmp_path / "model")
    before = Snapshot.open(folder, "test/model").manifest

    (folder / name).write_text((folder / name).read_text() + "\n")

    assert Snapshot.open(folder, "test/model").manifest != before


def test_manifest_changes_with_the_weights(tmp_path):
    folder = make_llama_checkpoint(tmp_path / "model", seed=1)
    before = Snapshot.open(folder, "test/model").manifest

    make_llama_checkpoint(folder, seed=2)

    assert Snapshot.open(folder, "test/model").manifest != before


def test_weights_are_hashed_once(tmp_path, monkeypatch):
    folder = make_llama_checkpoint(tmp_path / "model")
    first = Snapshot.open(folder, "test/model").manifest

    def refuse(*_):
        raise AssertionError("hashed again")

    monkeypatch.setattr(hashes.hashlib, "file_digest", refuse)

    assert Snapshot.open(folder, "test/model").manifest == first


def change_one_byte(path):
    """Change a file's content alone: its size stays."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("listed", [False, True])
def test_blob_of_the_hub_is_not_believed_by_its_name(tmp_path, listed):
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "revision"
    blobs.mkdir()
    make_llama_checkpoint(folder)
    plain = Snapshot.open(folder, "test/model").manifest
    weights = folder / "model.safetensors"
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    if listed:
        write_manifest(folder)
    weights.rename(blobs / sha256)
    weights.symlink_to(blobs / sha256)
    assert Snapshot.open(folder, "test/model").manifest == plain

    change_one_byte(blobs / sha256)

    if listed:
        with pytest.raises(CorruptModel):
            Snapshot.open(folder, "test/model")
    else:
        assert Snapshot.open(folder, "test/model").manifest != plain


def test_weights_that_are_not_the_listed_ones_are_corrupt(tmp_path):
    folder = make_llama_checkpoint(tmp_path / "model", files=2)
    write_manifest(folder)
    Snapshot.open(folder, "test/model")

    change_one_byte(folder / "model-00002-of-00002.safetensors")

    with pytest.raises(CorruptModel, match="00002"):
        Snapshot.open(folder, "test/model")


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_a_list_of_other_files_than_the_index_names_is_corrupt(tmp_path, change):
    folder = make_llama_checkpoint(tmp_path / "model", files=2)
    write_manifest(folder)
    path = folder / "manifest.json"
    listed = json.loads(path.read_text())["files"]
    entry = listed["model-00002-of-00002.safetensors"]
    if change == "missing":
        del listed["model-00002-of-00002.safetensors"]
    else:
        listed["other.safetensors"] = entry
    path.write_text(json.dumps({"files": listed}))

    with pytest.raises(CorruptModel):
        Snapshot.open(folder, "test/model")


def test_folder_without_config_is_not_found(tmp_path):
    with pytest.raises(ModelNotFound):
        Snapshot.open(tmp_path, "test/model")


def test_folder_without_weights_or_manifest_is_not_found(tmp_path):
    folder = make_llama_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").unlink()

    with pytest.raises(ModelNotFound):
        Snapshot.open(folder, "test/model")


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"files": {}}',
        '{"files": {"model.safetensors": {"size": 1}}}',
        '{"files": {"model.safetensors": {"size": 1, "sha256": "ab"}}}',
        json.dumps({"files": {"../x": {"size": 1, "sha256": "0" * 64}}}),
        json.dumps({"files": {"model.safetensors": {"size": 1, "sha256": "0" * 64}}}),
    ],
)
def test_manifest_that_does_not_hold_is_corrupt(tmp_path, text):
    folder = make_llama_checkpoint(tmp_path / "model")
    (folder / "manifest.json").write_text(text)

    with pytest.raises(CorruptModel):
        Snapshot.open(folder, "test/model")


def test_config_over_the_cap_is_corrupt(tmp_path):
    folder = make_llama_checkpoint(tmp_path / "model")
    (folder / "config.json").write_text("{}" + " " * (1 << 20))

    with pytest.raises(CorruptModel):
        Snapshot.open(folder, "test/model")


def test_opening_imports_no_jax():
    code = "import sys, pals.models.snapshot; sys.exit('jax' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
