import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from pals import config
from pals.errors import CorruptModel, LayersOutsideModel, ModelNotFound
from pals.models import gguf as importer
from pals.models.gguf import DEMO_MODEL_ID
from pals.models.hub import files_for_layers, imported_models, resolve_model
from pals.types import LayerRange
from tests import checkpoints
from tests.demo_model import import_demo_model

NAME = "org/tiny"
FILES = 4

INDEX = {
    "weight_map": {
        "model.embed_tokens.weight": "a.safetensors",
        "model.layers.0.mlp.up_proj.weight": "a.safetensors",
        "model.layers.1.mlp.up_proj.weight": "b.safetensors",
        "model.layers.2.mlp.up_proj.weight": "c.safetensors",
        "model.layers.10.mlp.up_proj.weight": "d.safetensors",
        "model.norm.weight": "e.safetensors",
        "lm_head.weight": "f.safetensors",
    }
    | {f"model.layers.{i}.mlp.up_proj.weight": "c.safetensors" for i in range(3, 10)}
}


@pytest.mark.parametrize(
    ("layers", "tied", "files"),
    [
        ("0:1", False, "a"),
        ("1:2", False, "b"),
        ("1:10", False, "bc"),
        ("10:11", False, "def"),
        ("10:11", True, "adef"),
        ("0:11", False, "abcdef"),
    ],
)
def test_a_range_needs_only_the_files_of_its_layers(layers: str, tied: bool, files: str):
    found = files_for_layers(INDEX, LayerRange.parse(layers), 11, tied)
    assert found == [f"{file}.safetensors" for file in files]


def test_a_range_past_the_model_is_refused():
    with pytest.raises(LayersOutsideModel):
        files_for_layers(INDEX, LayerRange(10, 12), 11, tied=False)


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"weight_map": []},
        {"weight_map": {"model.layers.0.x": "../a.safetensors"}},
        {"weight_map": {"model.layers.0.x": "/etc/a.safetensors"}},
        {"weight_map": {"model.layers.0.x": "*.safetensors"}},
        {"weight_map": {"model.layers.0.x": "model.bin"}},
        {"weight_map": {"model.layers.0.x": 3}},
        {"weight_map": {"model.layers.1.x": "a.safetensors"}},
    ],
)
def test_an_index_that_lies_is_refused(index: dict[str, object]):
    with pytest.raises(CorruptModel):
        files_for_layers(index, LayerRange(0, 1), 2, tied=False)


# --- folders on this machine ---------------------------------------------------------


def test_a_path_is_opened_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = checkpoints.make_llama_checkpoint(tmp_path / "tiny")
    assert resolve_model(str(folder), LayerRange(0, 4)).path == folder
    monkeypatch.chdir(tmp_path)
    assert resolve_model("./tiny").model_id == "tiny"


def test_a_path_without_the_weights_of_the_layers_is_refused(tmp_path: Path):
    folder = checkpoints.make_llama_checkpoint(tmp_path / "tiny", files=FILES)
    write_manifest(folder)
    (folder / "model-00002-of-00004.safetensors").unlink()
    resolve_model(str(folder))
    with pytest.raises(ModelNotFound, match="model-00002-of-00004"):
        resolve_model(str(folder), LayerRange(0, 4))


def test_layers_past_a_local_model_are_refused(tmp_path: Path):
    folder = checkpoints.make_llama_checkpoint(tmp_path / "tiny")
    with pytest.raises(LayersOutsideModel):
        resolve_model(str(folder), LayerRange(3, 5))


def test_an_imported_model_is_found_and_listed_by_its_name():
    folder = config.cache_dir() / "models" / "org--tiny"
    checkpoints.make_llama_checkpoint(folder)
    assert resolve_model(NAME, LayerRange(0, 4)).path == folder
    assert [model.model_id for model in imported_models()] == [NAME]


@pytest.mark.parametrize("name", ["tiny", "", "org/../x", "-org/tiny", "a/b/c", "org/ti ny"])
def test_a_name_that_is_none_is_refused(name: str):
    with pytest.raises(ModelNotFound, match="org/name"):
        resolve_model(name)


# --- the hub -------------------------------------------------------------------------


class FakeHub:
    """Stands for the hub's client: a folder of files, copied on demand into a cache."""

    def __init__(self, source: Path, cache: Path) -> None:
        self.source = source
        self.cache = cache
        self.fetched: list[list[str]] = []
        self.error: Exception | None = None

    def model_info(self, name: str, *, files_metadata: bool, timeout: float) -> SimpleNamespace:
        assert (name, files_metadata) == (NAME, True)
        assert timeout <= 30
        if self.error is not None:
            raise self.error
        manifest = json.loads((self.source / "manifest.json").read_text())["files"]
        siblings = [
            SimpleNamespace(rfilename=file, lfs=SimpleNamespace(**entry))
            for file, entry in manifest.items()
        ]
        return SimpleNamespace(sha="c0ffee", siblings=siblings)

    def snapshot_download(
        self, name: str, *, revision: str, allow_patterns: list[str], **_: float
    ) -> str:
        assert (name, revision) == (NAME, "c0ffee")
        self.fetched.append(allow_patterns)
        self.cache.mkdir(parents=True, exist_ok=True)
        for file in allow_patterns:
            if (self.source / file).exists():
                shutil.copy(self.source / file, self.cache)
        return str(self.cache)

    def try_to_load_from_cache(self, name: str, file: str) -> str | None:
        path = self.cache / file
        return str(path) if path.exists() else None


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    source = checkpoints.make_llama_checkpoint(tmp_path / "source", files=FILES)
    write_manifest(source)
    fake = FakeHub(source, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", fake.try_to_load_from_cache)
    return fake


def write_manifest(folder: Path) -> None:
    """Write manifest.json from the files, as an import does."""
    files = {
        path.name: {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in folder.glob("*.safetensors")
    }
    (folder / "manifest.json").write_text(json.dumps({"files": files}))


def test_a_driver_fetches_no_weights_and_names_the_same_model_as_a_shard(fake_hub: FakeHub):
    driver = resolve_model(NAME)
    assert not list(fake_hub.cache.glob("*.safetensors"))
    shard = resolve_model(NAME, LayerRange(2, 3))
    assert driver.manifest == shard.manifest


def test_a_shard_fetches_the_files_of_its_layers(fake_hub: FakeHub):
    index = json.loads((fake_hub.source / "model.safetensors.index.json").read_text())
    wanted = files_for_layers(index, LayerRange(2, 3), 4, tied=True)
    assert 0 < len(wanted) < FILES
    resolve_model(NAME, LayerRange(2, 3))
    assert fake_hub.fetched[-1] == wanted
    assert sorted(p.name for p in fake_hub.cache.glob("*.safetensors")) == wanted


def test_a_config_that_cannot_run_is_refused_before_any_weights(fake_hub: FakeHub):
    with pytest.raises(LayersOutsideModel):
        resolve_model(NAME, LayerRange(3, 9))
    assert len(fake_hub.fetched) == 1


def test_weights_without_a_hash_are_not_taken(fake_hub: FakeHub):
    path = fake_hub.source / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["model-00001-of-00004.safetensors"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ModelNotFound, match="model-00001-of-00004"):
        resolve_model(NAME)


def test_without_network_the_hub_s_cache_serves(fake_hub: FakeHub):
    first = resolve_model(NAME, LayerRange(0, 4))
    fake_hub.error = ConnectionError("no route")
    assert resolve_model(NAME, LayerRange(0, 4)) == first


def test_without_network_and_cache_the_reason_is_given(fake_hub: FakeHub):
    fake_hub.error = ConnectionError("no route\nsecond line")
    with pytest.raises(ModelNotFound) as caught:
        resolve_model(NAME)
    assert str(caught.value).endswith("no route")
    assert caught.value.fields["model"] == NAME


def test_the_real_client_respects_offline_mode():
    with pytest.raises(ModelNotFound, match="offline"):
        resolve_model(NAME)


def test_the_demo_model_is_imported_when_nothing_else_has_it(monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []

    def fake_import(file: Path, *, model_id: str) -> Path:
        calls.append(model_id)
        return checkpoints.make_llama_checkpoint(config.cache_dir() / "models" / "imported")

    monkeypatch.setattr(importer, "import_gguf", fake_import)
    assert resolve_model(DEMO_MODEL_ID, LayerRange(0, 4)).model_id == DEMO_MODEL_ID
    assert calls == [DEMO_MODEL_ID]


def test_the_imported_demo_model_is_found(shared_cache: Path, monkeypatch: pytest.MonkeyPatch):
    folder = import_demo_model(shared_cache)
    monkeypatch.setenv(config.CACHE_DIR_VARIABLE, str(shared_cache))
    snapshot = resolve_model(DEMO_MODEL_ID, LayerRange(10, 20))
    assert snapshot.path == folder
    assert snapshot.config.num_layers == 30
