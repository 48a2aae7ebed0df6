import json
from pathlib import Path

import pytest

from pals.errors import CorruptModel, ModelNotFound
from pals.models.listing import ListedFile, Listing
from pals.models.part_writer import PartWriter
from pals.models.safetensors import WeightFiles
from pals.models.store import (
    StoredPart,
    WeightStore,
    open_weights,
    parse_source,
    tensors_by_part,
)
from tests import checkpoints

COMMIT = "0" * 40
FILE = "model.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoints.make_llama_checkpoint(tmp_path / "source") / FILE


@pytest.fixture
def snapshot(tmp_path: Path, source: Path) -> Path:
    """Make a snapshot in a hub's cache of which layer 1 was downloaded."""
    folder = tmp_path / "models--org--tiny" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    store, file = store_of(folder), listed(source)
    store.keep_listing(COMMIT, Listing(files={FILE: file}, licence="mit"))
    data = source.read_bytes()
    head = data[: 8 + int.from_bytes(data[:8], "little")]
    store.keep_source(file, head)
    tensors = tensors_by_part(parse_source(head, source, len(data)))["layer-00001"]
    with PartWriter(store.part_path(file, "layer-00001"), tensors) as writer:
        for start, stop in writer.missing_ranges():
            writer.write(data[start:stop])
        writer.finish()
    return folder


def listed(source: Path) -> ListedFile:
    return ListedFile(name=FILE, size_bytes=source.stat().st_size, sha256="a" * 64)


def store_of(folder: Path) -> WeightStore:
    store = WeightStore.of(folder)
    assert store is not None
    return store


def read_layer(snapshot: Path, source: Path) -> StoredPart | None:
    store, file = store_of(snapshot), listed(source)
    kept = store.read_source(file)
    assert kept is not None
    return store.read_part(file, "layer-00001", tensors_by_part(kept)["layer-00001"])


def part_of(snapshot: Path, suffix: str) -> Path:
    (path,) = snapshot.parents[1].rglob(f"layer-00001{suffix}")
    return path


def test_only_a_snapshot_of_the_hub_s_cache_has_a_store(tmp_path: Path):
    cache = tmp_path / "models--org--tiny"
    assert WeightStore.of(cache / "snapshots" / COMMIT) == WeightStore(cache / "pals")
    assert WeightStore.of(tmp_path / "org--tiny") is None
    assert WeightStore.of(tmp_path / "snapshots" / COMMIT) is None


def test_downloaded_tensors_are_found_and_all_names_are_known(snapshot: Path, source: Path):
    weights = open_weights(snapshot)
    there = WeightFiles.open(source.parent)
    assert set(weights.file_of) == set(there.file_of)
    names = [name for name in there.file_of if ".layers.1." in name]
    entries = weights.entries(names)
    assert {n: (e.dtype, e.shape) for n, e in entries.items()} == {
        n: (e.dtype, e.shape) for n, e in there.entries(names).items()
    }
    assert weights.known_hashes(names).keys() == set(names)


def test_a_tensor_that_was_not_downloaded_is_named(snapshot: Path):
    with pytest.raises(ModelNotFound, match=r"org/tiny.*model\.norm\.weight"):
        open_weights(snapshot).entries(["model.norm.weight"])


def test_a_single_file_of_which_nothing_was_downloaded_has_no_names(snapshot: Path, source: Path):
    (store_of(snapshot).file_folder(listed(source)) / "header").unlink()
    with pytest.raises(ModelNotFound, match="none of its weights"):
        open_weights(snapshot)


@pytest.mark.parametrize(
    "state",
    [
        "",
        "[]",
        "{}",
        '{"size": 1, "mtime_ns": 1}',
        '{"size": 1, "mtime_ns": 1, "tensors": {}}',
        '{"size": 1, "mtime_ns": 1, "tensors": []}',
        '{"size": "1", "mtime_ns": 1, "tensors": {}}',
        '{"size": 1, "mtime_ns": 1, "tensors": {"x": "00"}}',
        "[" * 100_000,
    ],
)
def test_a_part_whose_hashes_are_unreadable_is_not_there(snapshot: Path, source: Path, state: str):
    assert read_layer(snapshot, source) is not None
    part_of(snapshot, ".json").write_text(state)
    assert read_layer(snapshot, source) is None


@pytest.mark.parametrize("size", [0, 4, 100, 1000, -1])
def test_a_part_that_was_cut_off_is_not_there(snapshot: Path, source: Path, size: int):
    path = part_of(snapshot, ".safetensors")
    path.write_bytes(path.read_bytes()[:size])
    assert read_layer(snapshot, source) is None


def test_a_part_with_other_bytes_is_not_there(snapshot: Path, source: Path):
    path = part_of(snapshot, ".safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert read_layer(snapshot, source) is None


def test_a_part_of_other_tensors_is_not_there(snapshot: Path, source: Path):
    store, file = store_of(snapshot), listed(source)
    kept = store.read_source(file)
    assert kept is not None
    path = store.part_path(file, "layer-00001")
    for suffix in (".safetensors", ".json"):
        path.with_suffix(suffix).rename(path.with_name(f"layer-00002{suffix}"))
    assert store.read_part(file, "layer-00002", tensors_by_part(kept)["layer-00002"]) is None


def test_a_discarded_part_is_not_there(snapshot: Path, source: Path):
    stored = read_layer(snapshot, source)
    assert stored is not None
    assert stored.damaged() == []
    stored.discard()
    assert read_layer(snapshot, source) is None


@pytest.mark.parametrize("cut", [0, 3, 8, 100, -1])
def test_a_head_that_is_not_whole_is_refused(snapshot: Path, source: Path, cut: int):
    header = store_of(snapshot).file_folder(listed(source)) / "header"
    header.write_bytes(header.read_bytes()[:cut])
    with pytest.raises(CorruptModel):
        store_of(snapshot).read_source(listed(source))


def test_a_listing_comes_back_as_it_was_kept(snapshot: Path, source: Path):
    listing = store_of(snapshot).read_listing(COMMIT)
    assert listing == Listing(files={FILE: listed(source)}, licence="mit")


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"files": []}',
        '{"files": {"a": {"size": "1", "sha256": "' + "a" * 64 + '"}}}',
        '{"files": {"a": {"size": 1, "sha256": "../../../etc/passwd"}}}',
        '{"files": {"a": {"size": 1}}}',
    ],
)
def test_a_listing_that_lies_is_refused(snapshot: Path, content: str):
    (snapshot.parents[1] / "pals" / "manifests" / f"{COMMIT}.json").write_text(content)
    with pytest.raises(CorruptModel):
        store_of(snapshot).read_listing(COMMIT)


def test_an_index_that_names_an_unlisted_file_is_refused(snapshot: Path):
    index = {"weight_map": {"model.layers.0.x": "other.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptModel, match="not in the list"):
        open_weights(snapshot)
