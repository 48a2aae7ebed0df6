import json
import os

import numpy as np
import pytest

from pals.errors import CorruptModel, UnsupportedModel
from pals.models import safetensors
from pals.models.safetensors import WeightFiles, read_header
from tests.checkpoints import write_safetensors, write_weights


def write_raw(path, header, data=b""):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_was_written(tmp_path):
    weights = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float16)}
    write_safetensors(tmp_path / "model.safetensors", weights)

    entries = WeightFiles.open(tmp_path).entries(["a", "b"])

    for name, array in weights.items():
        np.testing.assert_array_equal(entries[name].read(), array)
        assert entries[name].read().dtype == array.dtype


def test_reads_only_the_bytes_of_the_tensor(tmp_path, monkeypatch):
    big, small = np.zeros(1 << 20, np.float32), np.ones(3, np.float32)
    write_weights(tmp_path, {"big": big, "small": small}, files=2)
    sizes = []
    read = os.preadv

    def counting(handle, buffers, offset):
        sizes.append(read(handle, buffers, offset))
        return sizes[-1]

    monkeypatch.setattr(safetensors.os, "preadv", counting)
    WeightFiles.open(tmp_path).entries(["small"])["small"].read()

    assert sum(sizes) < 1000


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": entry([2], 0, 4)}, b"\0" * 4),
        ({"a": entry([1], 4, 8)}, b"\0" * 8),
        ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"\0" * 8),
        ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"\0" * 12),
        ({"a": entry([1], 0, 4)}, b"\0" * 5),
        ({"a": entry([2], 0, 8)}, b"\0" * 4),
        ({"a": entry([-1], 0, 4)}, b"\0" * 4),
        ({"a": entry([1.0], 0, 4)}, b"\0" * 4),
        ({"a": entry([True], 0, 4)}, b"\0" * 4),
        ({"a": entry([1] * 9, 0, 4)}, b"\0" * 4),
        ({"a": entry([2**47, 2**47], 0, 4)}, b"\0" * 4),
        ({"a": entry([1], 4, 0)}, b"\0" * 4),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"\0" * 4),
        ({"a": [1, 2]}, b""),
        ([], b""),
        (b"{", b""),
        (b"\xff\xff", b""),
        (b"[" * 100_000, b""),
        (b'{"a": {}, "a": {}}', b""),
    ],
)
def test_header_that_lies_is_corrupt(tmp_path, header, data):
    path = write_raw(tmp_path / "model.safetensors", header, data)

    with pytest.raises(CorruptModel):
        read_header(path)


@pytest.mark.parametrize("data", [b"", b"\0" * 7, (1 << 62).to_bytes(8, "little") + b"{}"])
def test_file_without_a_whole_header_is_corrupt(tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)

    with pytest.raises(CorruptModel):
        read_header(path)


def test_header_over_the_cap_is_corrupt(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((17 << 20).to_bytes(8, "little"))
        file.truncate(18 << 20)

    with pytest.raises(CorruptModel):
        read_header(path)


def test_unknown_dtype_is_unsupported(tmp_path):
    path = write_raw(tmp_path / "model.safetensors", {"a": entry([1], 0, 4, "F4")}, b"\0" * 4)

    with pytest.raises(UnsupportedModel):
        read_header(path)


def test_integers_that_no_format_packs_are_unsupported(tmp_path):
    path = write_raw(tmp_path / "model.safetensors", {"a": entry([1], 0, 4, "U32")}, b"\0" * 4)

    with pytest.raises(UnsupportedModel):
        read_header(path)["a"].read()


def test_file_that_shrank_after_its_header_is_corrupt(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": np.ones(8, np.float32)})
    found = read_header(path)["a"]
    os.truncate(path, path.stat().st_size - 1)

    with pytest.raises(CorruptModel):
        found.read()


@pytest.mark.parametrize(
    "file_name",
    ["../out.safetensors", "/etc/out.safetensors", "a/b.safetensors", "..", "x.bin", ".x"],
)
def test_index_that_leads_elsewhere_is_corrupt(tmp_path, file_name):
    index = {"weight_map": {"a": file_name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(CorruptModel):
        WeightFiles.open(tmp_path)


def test_link_out_of_the_folder_is_refused(tmp_path):
    write_safetensors(tmp_path / "secret.safetensors", {"a": np.ones(1, np.float32)})
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")

    with pytest.raises(CorruptModel):
        WeightFiles.open(folder)


def test_link_into_the_blobs_of_the_hub_cache_is_followed(tmp_path):
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "revision"
    blobs.mkdir()
    folder.mkdir(parents=True)
    write_safetensors(blobs / "abc", {"a": np.ones(1, np.float32)})
    (folder / "model.safetensors").symlink_to(blobs / "abc")

    assert WeightFiles.open(folder).entries(["a"])["a"].read() == [1.0]


def test_pipe_instead_of_a_file_is_corrupt_and_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")

    with pytest.raises(CorruptModel):
        WeightFiles.open(tmp_path)


def test_index_that_promises_too_much_is_corrupt(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"a": np.ones(1, np.float32)})
    index = {"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(CorruptModel) as caught:
        WeightFiles.open(tmp_path).entries(["a", "b"])
    assert "b" in caught.value.fields["problem"]
