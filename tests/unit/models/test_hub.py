"""Finding a model; downloads are tested in tests/integration/models."""

import hashlib
import json
from pathlib import Path

import pytest

from pals import config
from pals.errors import CorruptModel, LayersOutsideModel, ModelNotFound
from pals.models import gguf as importer
from pals.models.gguf import DEMO_MODEL_ID
from pals.models.hub import imported_models, resolve_model
from pals.types import LayerRange
from tests import checkpoints
from tests.demo_model import import_demo_model

NAME = "org/tiny"
FILES = 4
INDEX_NAME = "model.safetensors.index.json"


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
        {"weight_map": {"model.layers.1.x": "model.safetensors"}},
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, index: dict[str, object]):
    folder = checkpoints.make_llama_checkpoint(tmp_path / "tiny")
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CorruptModel):
        resolve_model(str(folder), LayerRange(0, 1))


# --- the hub -------------------------------------------------------------------------


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
