import hashlib
import json
import os
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pals import config
from pals.errors import CorruptModel, ModelNotFound, ModelNotWritten, UnsupportedModel
from pals.models import gguf as importer
from pals.models.gguf import import_gguf, packaged_demo_model, round_to_bf16
from pals.models.snapshot import Snapshot
from tests import checkpoints
from tests.unit.models.gguf_files import (
    ARCHITECTURES,
    TOKENS,
    hf_weights,
    to_gguf,
    write_gguf,
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny-Q8.v1.gguf", to_gguf(hf_weights()))


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """Read model.safetensors by the format's own rules."""
    raw = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + size])
    table.pop("__metadata__")
    tensors = {}
    for name, entry in table.items():
        dtype = {"BF16": ml_dtypes.bfloat16, "F32": np.float32}[entry["dtype"]]
        start, stop = (8 + size + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(raw[start:stop], dtype).reshape(entry["shape"])
    assert stop == len(raw)
    return tensors


def as_written(name: str, array: np.ndarray) -> np.ndarray:
    """Norms, biases and routers stay float32; every other weight becomes bf16."""
    keeps = array.ndim == 1 or name.endswith("mlp.gate.weight")
    return array if keeps else array.astype(ml_dtypes.bfloat16)


def assert_same(imported: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> None:
    assert imported.keys() == weights.keys()
    for name, array in weights.items():
        expected = as_written(name, array)
        assert imported[name].dtype == expected.dtype, name
        np.testing.assert_array_equal(imported[name], expected, err_msg=name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_come_back_as_those_of_the_checkpoint(
    tmp_path: Path, architecture: str, tied: bool
):
    weights = hf_weights(architecture, tied=tied)
    if architecture == "gemma3":
        # the converter's 1 + w keeps the lowest bits of w only where both have a grid in common
        grid = np.float32(2.0**-20)
        weights = {
            k: np.round(w / grid) * grid if k.endswith("norm.weight") else w
            for k, w in weights.items()
        }
    file = write_gguf(
        tmp_path / "m.gguf", to_gguf(weights, architecture), architecture=architecture
    )
    assert_same(read_weights(import_gguf(file)), weights)


def test_biases_of_llama_are_put_in_order_with_their_weights(tmp_path: Path):
    weights = hf_weights(biases=True)
    folder = import_gguf(write_gguf(tmp_path / "m.gguf", to_gguf(weights)))
    assert_same(read_weights(folder), weights)
    config = json.loads((folder / "config.json").read_text())
    assert (config["attention_bias"], config["mlp_bias"]) == (True, True)


KINDS = [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.F16, Kind.BF16]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3moe"])
def test_quantised_weights_are_those_of_the_library(
    tmp_path: Path, architecture: str, kind: Kind, monkeypatch: pytest.MonkeyPatch
):
    """Also when a tensor is converted in several blocks, of which the last is short."""
    monkeypatch.setattr(importer, "BLOCK_ELEMENTS", 500)
    weights = hf_weights(architecture, biases=architecture == "llama")
    file = write_gguf(
        tmp_path / "m.gguf",
        to_gguf(weights, architecture),
        architecture=architecture,
        quantisation=kind,
    )
    for name, array in weights.items():
        if array.ndim == 2 and not name.endswith("mlp.gate.weight"):
            weights[name] = gguf.dequantize(gguf.quantize(array, kind), kind)
    assert_same(read_weights(import_gguf(file)), weights)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(arrays.arrays(np.float32, st.integers(1, 50), elements=finite))
def test_rounding_to_bf16_is_to_the_nearest_even(values: np.ndarray):
    with np.errstate(over="ignore"):
        expected = values.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(round_to_bf16(values).view(ml_dtypes.bfloat16), expected)


def test_the_folder_opens_as_a_snapshot_of_its_config(file: Path):
    snapshot = Snapshot.open(import_gguf(file), "x/y")
    assert snapshot.config.num_layers == 2
    assert snapshot.config.rms_norm_eps == 1e-5
    assert snapshot.config.tie_word_embeddings
    assert snapshot.config.eos_token_ids == (checkpoints.EOS_ID,)
    assert snapshot.config.vocab_size == len(TOKENS)


def test_an_imported_model_opens_without_being_hashed(file: Path, monkeypatch: pytest.MonkeyPatch):
    folder = import_gguf(file)

    def refuse(*_):
        raise AssertionError("hashed again")

    monkeypatch.setattr(hashlib, "file_digest", refuse)
    Snapshot.open(folder, "test/tiny")


def test_the_manifest_states_size_and_hash_of_the_weights(file: Path):
    folder = import_gguf(file)
    raw = (folder / "model.safetensors").read_bytes()
    assert json.loads((folder / "manifest.json").read_text()) == {
        "files": {
            "model.safetensors": {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        }
    }


def test_the_name_is_made_of_organisation_and_file(file: Path):
    assert import_gguf(file) == config.cache_dir() / "models" / "Test-Org--tiny-Q8.v1"


@pytest.mark.parametrize("name", ["x", "../y", "a/../b", "-a/b", "a/b/c", "a--b/c", "a/b..c", ""])
def test_a_name_that_is_none_is_refused(file: Path, name: str):
    with pytest.raises(ModelNotFound):
        import_gguf(file, model_id=name)


def test_the_same_file_again_is_returned_untouched(file: Path):
    folder = import_gguf(file, model_id="a/b")
    before = (folder / "model.safetensors").stat()
    assert import_gguf(file, model_id="a/b") == folder
    after = (folder / "model.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_another_file_of_the_same_name_takes_its_place(file: Path, tmp_path: Path):
    folder = import_gguf(file, model_id="a/b")
    other = hf_weights(seed=1)
    import_gguf(write_gguf(tmp_path / "other.gguf", to_gguf(other)), model_id="a/b")
    name = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_array_equal(
        read_weights(folder)[name], other[name].astype(ml_dtypes.bfloat16)
    )
    assert [p.name for p in folder.parent.iterdir()] == ["a--b"]


def test_an_import_that_another_process_finished_first_is_kept(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "out" / "m"
    publish = importer._publish

    def late(work: Path, target: Path, origin: dict) -> None:
        monkeypatch.setattr(importer, "_publish", publish)
        import_gguf(file, destination=folder)
        (folder / "mark").touch()
        publish(work, target, origin)

    monkeypatch.setattr(importer, "_publish", late)
    assert import_gguf(file, destination=folder) == folder
    assert (folder / "mark").exists()
    assert os.listdir(folder.parent) == ["m"]


def test_nothing_stays_of_an_import_that_failed(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(importer, "_write_weights", full)
    with pytest.raises(ModelNotWritten, match="No space"):
        import_gguf(file, destination=tmp_path / "out" / "m")
    assert os.listdir(tmp_path / "out") == []


def test_weights_that_are_not_finite_are_refused(tmp_path: Path):
    weights = to_gguf(hf_weights())
    weights["blk.1.ffn_up.weight"][3, 4] = np.inf
    with pytest.raises(CorruptModel, match=r"blk\.1\.ffn_up"):
        import_gguf(write_gguf(tmp_path / "m.gguf", weights))


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("blk.1.ffn_up.weight", "drop", CorruptModel),
        ("output_norm.weight", "drop", CorruptModel),
        ("blk.0.attn_q.weight", "shape", CorruptModel),
        ("blk.0.attn_k.bias", "add", UnsupportedModel),
        ("rope_factors_long.weight", "add", UnsupportedModel),
        ("blk.2.ffn_up.weight", "add", UnsupportedModel),
    ],
)
def test_tensors_must_be_exactly_those_of_the_model(
    tmp_path: Path, name: str, change: str, error: type[Exception]
):
    weights = to_gguf(hf_weights())
    if change == "drop":
        del weights[name]
    else:
        weights[name] = np.ones((32, 64) if change == "shape" else 32, np.float32)
    with pytest.raises(error) as caught:
        import_gguf(write_gguf(tmp_path / "m.gguf", weights))
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("llama.block_count", None, CorruptModel),
        ("llama.block_count", 0, CorruptModel),
        ("llama.block_count", 2**31, CorruptModel),
        ("llama.embedding_length", "wide", CorruptModel),
        ("llama.embedding_length", 2**31, CorruptModel),
        ("llama.attention.head_count", 0, CorruptModel),
        ("llama.attention.head_count", 3, CorruptModel),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), CorruptModel),
        ("llama.rope.freq_base", 0.0, CorruptModel),
        ("llama.rope.scaling.type", "longrope", UnsupportedModel),
        ("llama.rope.scaling.type", "yarn", CorruptModel),
        ("llama.attention.sliding_window", 16, UnsupportedModel),
        ("split.count", 3, UnsupportedModel),
        ("llama.expert_count", 8, UnsupportedModel),
        ("llama.attention.key_length", 16, CorruptModel),
        ("llama.attention.key_length", 7, CorruptModel),
        ("tokenizer.ggml.model", "llama", CorruptModel),
        ("tokenizer.ggml.model", "t5", UnsupportedModel),
        ("tokenizer.ggml.pre", "unheard-of", UnsupportedModel),
        ("tokenizer.ggml.pre", None, UnsupportedModel),
        ("tokenizer.ggml.token_type", [1, 2], CorruptModel),
        ("tokenizer.ggml.merges", ["a b", "no-space"], CorruptModel),
        ("tokenizer.ggml.merges", ["x y"], CorruptModel),
        ("tokenizer.ggml.eos_token_id", 10**6, CorruptModel),
        ("tokenizer.chat_template", 3, CorruptModel),
    ],
)
def test_metadata_that_is_missing_wrong_or_foreign_is_refused(
    tmp_path: Path, key: str, value: object, error: type[Exception]
):
    file = write_gguf(tmp_path / "m.gguf", to_gguf(hf_weights()), metadata={key: value})
    with pytest.raises(error):
        import_gguf(file, destination=tmp_path / "out" / "m")
    assert not (tmp_path / "out").exists()


def test_another_architecture_is_named(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match="`mamba`"):
        import_gguf(tmp_path / "m.gguf")


def test_the_demo_model_is_found_in_its_package():
    file = packaged_demo_model()
    assert file is not None
    assert file.stat().st_size > 90_000_000


def test_without_the_package_there_is_no_demo_model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importer, "DEMO_PACKAGE", "a_package_that_is_not_installed")
    assert packaged_demo_model() is None
