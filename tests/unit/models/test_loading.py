"""What a shard's weights are read from: layers that were prepared, else the checkpoint."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from pals.config import cache_dir
from pals.errors import CorruptModel, ModelNotFound
from pals.models import files, safetensors
from pals.models.build import AbstractModel
from pals.models.layer_hashes import layer_hashes
from pals.models.listing import Listing
from pals.models.loading import load_shard_parameters
from pals.models.numerics import Numerics
from pals.models.quantize import quantize_int4, quantize_int8
from pals.models.safetensors import read_header
from pals.models.snapshot import MANIFEST_NAME, Snapshot, hash_weights
from pals.types import LayerRange, Quantization
from tests.checkpoints import make_llama_checkpoint, make_qwen3_moe_checkpoint, write_safetensors

KINDS = {
    "int8": Numerics.of("int8"),
    "int4-32": Numerics.of("int4", Quantization(group_size=32)),
    "int4-64": Numerics.of("int4", Quantization(group_size=64)),
}
INT8 = KINDS["int8"]
NUM_LAYERS = 4


def load(folder: Path, layers: str, numerics: Numerics = INT8):
    """Return the loaded parameters by name, and the hashes of the layers."""
    snapshot, part = Snapshot.open(folder, "test/model"), LayerRange.parse(layers)
    parameters = AbstractModel.build(snapshot.config, part, numerics).parameters
    loaded = load_shard_parameters(snapshot, part, numerics, parameters)
    arrays = {
        ".".join(map(str, path)): np.asarray(leaf)
        for path, leaf in zip(parameters, loaded.leaves, strict=True)
    }
    return arrays, loaded.layer_hashes


def make(folder: Path, *, one_file_each: bool = False, **options) -> Path:
    """Write a model whose list of weight files is kept, so that they need not be there."""
    make_llama_checkpoint(folder, num_layers=NUM_LAYERS, **options)
    if one_file_each:
        split_by_layers(folder)
    weights = {file.name: file for file in hash_weights(folder, "test/model")}
    (folder / MANIFEST_NAME).write_bytes(Listing(files=weights).to_json())
    return folder


def split_by_layers(folder: Path) -> None:
    """Put each layer's tensors into a file of their own, and the ends into another."""
    tensors = {n: e.read() for n, e in read_header(folder / "model.safetensors").items()}
    weight_map = {
        name: f"layer-{name.split('.')[2]}.safetensors"
        if ".layers." in name
        else "ends.safetensors"
        for name in tensors
    }
    for file in set(weight_map.values()):
        here = {name: array for name, array in tensors.items() if weight_map[name] == file}
        write_safetensors(folder / file, here)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def prepared_parts() -> dict[str, set[str]]:
    """Return the parts that are kept of each model and kind."""
    root = cache_dir() / "prepared"
    return {
        str(kind.relative_to(root)): {part.name for part in kind.iterdir()} - {"lock"}
        for kind in root.glob("*/*")
    }


def assert_equal(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.fixture
def opened(monkeypatch):
    """The weight files that are opened, by name."""
    names: list[str] = []
    open_regular = files.open_regular

    def recording(path):
        if path.suffix == ".safetensors":
            names.append(path.name)
        return open_regular(path)

    monkeypatch.setattr(safetensors, "open_regular", recording)
    return names


# --- plain weights -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_plain_weights_are_read_directly_and_nothing_is_kept(tmp_path, dtype):
    folder = make(tmp_path / "model")
    arrays, hashes = load(folder, "0:4", Numerics.of(dtype))

    source = read_header(folder / "model.safetensors")
    name = "layers.2.mlp.down_proj.weight"
    expected = source[f"model.{name}"].read().astype(Numerics.of(dtype).compute)
    np.testing.assert_array_equal(arrays[name], expected)
    assert len(hashes) == NUM_LAYERS
    assert not (cache_dir() / "prepared").exists()


# --- quantised weights ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_are_quantised_and_the_rest_is_not(tmp_path, kind):
    folder, numerics = make(tmp_path / "model"), KINDS[kind]
    arrays, _ = load(folder, "1:4", numerics)

    source = {n: e.read() for n, e in read_header(folder / "model.safetensors").items()}
    matrix = source["model.layers.2.mlp.down_proj.weight"]
    expected = (
        quantize_int8(matrix) if kind == "int8" else quantize_int4(matrix, numerics.group_size)
    )
    for leaf, array in expected._asdict().items():
        np.testing.assert_array_equal(arrays[f"layers.1.mlp.down_proj.weight.{leaf}"], array)
    for name, stored in {
        "layers.1.input_layernorm.weight": "model.layers.2.input_layernorm.weight",
        "norm.weight": "model.norm.weight",
        "lm_head.weight": "model.embed_tokens.weight",
    }.items():
        np.testing.assert_array_equal(arrays[name], source[stored].astype(numerics.compute))


@pytest.mark.parametrize("kind", KINDS)
def test_a_restart_opens_no_file_of_the_checkpoint(tmp_path, opened, kind):
    folder = make(tmp_path / "model")
    first, hashes = load(folder, "0:4", KINDS[kind])
    (folder / "model.safetensors").unlink()
    opened.clear()

    again, hashes_again = load(folder, "0:4", KINDS[kind])

    assert_equal(again, first)
    assert hashes_again == hashes
    assert opened == []


def test_a_moved_range_opens_only_the_files_of_what_is_new(tmp_path, opened):
    folder = make(tmp_path / "model", one_file_each=True)
    reference, hashes = load(folder, "1:3", INT8)
    shutil.rmtree(cache_dir() / "prepared")
    load(folder, "0:2", INT8)
    (folder / "layer-0.safetensors").unlink()
    (folder / "layer-1.safetensors").unlink()
    opened.clear()

    moved, hashes_moved = load(folder, "1:3", INT8)

    assert_equal(moved, reference)
    assert hashes_moved == hashes
    assert set(opened) == {"layer-2.safetensors"}


def test_a_moved_range_reads_only_the_bytes_of_what_is_new(tmp_path, monkeypatch):
    folder = make(tmp_path / "model")
    load(folder, "0:2", INT8)
    header = read_header(folder / "model.safetensors")
    spans = [
        (entry.offset, entry.offset + entry.size_bytes)
        for name, entry in header.items()
        if name.startswith("model.layers.2.")
    ]
    start_of_data = min(entry.offset for entry in header.values())
    outside: list[int] = []
    preadv = os.preadv

    def checking(handle, buffers, offset):
        count = preadv(handle, buffers, offset)
        inside = any(start <= offset and offset + count <= stop for start, stop in spans)
        if offset >= start_of_data and not inside:
            outside.append(offset)
        return count

    monkeypatch.setattr(safetensors.os, "preadv", checking)
    load(folder, "1:3", INT8)

    assert outside == []


def test_what_is_neither_prepared_nor_there_is_a_named_error(tmp_path):
    folder = make(tmp_path / "model", one_file_each=True)
    load(folder, "0:2", INT8)
    (folder / "layer-2.safetensors").unlink()

    with pytest.raises((CorruptModel, ModelNotFound), match="layer-2"):
        load(folder, "1:3", INT8)


def test_each_kind_of_numbers_is_kept_by_itself(tmp_path):
    folder = make(tmp_path / "model")
    alone = {}
    for kind, numerics in KINDS.items():
        alone[kind], _ = load(folder, "1:2", numerics)

    manifest = Snapshot.open(folder, "test/model").manifest.hex()
    assert prepared_parts() == {f"{manifest}/{kind}-layout1": {"layer-00001"} for kind in KINDS}
    for kind, numerics in KINDS.items():
        assert_equal(load(folder, "1:2", numerics)[0], alone[kind])


def test_another_version_of_a_model_is_kept_by_itself(tmp_path):
    one = make(tmp_path / "one")
    other = make(tmp_path / "other", seed=1)
    first, _ = load(one, "1:2")
    second, _ = load(other, "1:2")

    assert len(prepared_parts()) == 2
    name = "layers.0.mlp.up_proj.weight.values"
    assert not np.array_equal(first[name], second[name])
    assert_equal(load(one, "1:2")[0], first)


def test_a_config_that_changed_is_another_version(tmp_path):
    folder = make(tmp_path / "model")
    load(folder, "1:2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    load(folder, "1:2")

    assert len(prepared_parts()) == 2


def test_ends_are_kept_with_the_layers(tmp_path):
    folder = make(tmp_path / "model", tied=False)
    load(folder, "0:1")
    load(folder, "3:4")

    (parts,) = prepared_parts().values()
    assert parts == {"embed_tokens", "layer-00000", "layer-00003", "norm", "lm_head"}


@pytest.mark.parametrize("keeps", [True, False])
def test_hashes_of_quantised_layers_are_those_of_the_source(tmp_path, monkeypatch, keeps):
    folder = make(tmp_path / "model")
    if not keeps:
        usage = shutil.disk_usage("/")._replace(free=0)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    source = layer_hashes(Snapshot.open(folder, "test/model").weights(), LayerRange(1, 4))

    for _ in range(2):
        assert load(folder, "1:4")[1] == tuple(source)
    assert prepared_parts().popitem()[1] == (
        {"layer-00001", "layer-00002", "layer-00003", "norm", "lm_head"} if keeps else set()
    )


def test_a_damaged_layer_is_made_again_from_the_source(tmp_path, caplog):
    folder = make(tmp_path / "model")
    first, _ = load(folder, "0:4")
    (damaged,) = (cache_dir() / "prepared").glob("*/*/layer-00002")
    for file in damaged.rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)

    assert_equal(load(folder, "0:4")[0], first)
    assert "layer-00002 is damaged and is prepared again" in caplog.text
    caplog.clear()
    assert_equal(load(folder, "0:4")[0], first)
    assert caplog.text == ""


def test_a_layer_that_is_refused_is_not_kept(tmp_path):
    folder = make(tmp_path / "model")
    tensors = {n: e.read() for n, e in read_header(folder / "model.safetensors").items()}
    tensors["model.layers.2.mlp.down_proj.weight"][-1, -1] = np.nan
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / MANIFEST_NAME).unlink()

    with pytest.raises(CorruptModel, match=r"model\.layers\.2\.mlp\.down_proj\.weight"):
        load(folder, "1:4")

    (parts,) = prepared_parts().values()
    assert parts == {"layer-00001"}


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_kept_and_found_again(tmp_path, kind):
    folder = make_qwen3_moe_checkpoint(tmp_path / "model", num_layers=2)
    first, _ = load(folder, "0:2", KINDS[kind])

    assert_equal(load(folder, "0:2", KINDS[kind])[0], first)
    assert first["layers.0.mlp.gate.weight"].dtype == KINDS[kind].compute
