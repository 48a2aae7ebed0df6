"""Folders that lie end in a named error, soon, in little memory, and run nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import checkpoints
from tests.integration.models.hostile import configs, files, tensors, texts
from tests.integration.models.hostile.cases import Case, make_model
from tests.integration.models.hostile.process import Loader

MOST_CPU_S = 5.0
MOST_GROWN_BYTES = 256 << 20
LOADS = "?"
ANY = "*"

EVIL_CODE = "import os, pathlib\npathlib.Path(os.path.dirname(__file__) + '/../PWNED').touch()\n"
EVIL_FILES = ("modeling_evil.py", "tokenization_evil.py", "configuration_evil.py", "setup.py")

CASES: dict[str, Case] = configs.CASES | files.CASES | tensors.CASES | texts.CASES


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loader]:
    root = tmp_path_factory.mktemp("hostile")
    loading = Loader(root, root / "cache")
    yield loading
    loading.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a sound model, beside code and pickles that leave a mark when they run."""
    folder = make_model(tmp_path / "model")
    (tmp_path / "secret.json").write_text("{}")
    checkpoints.write_safetensors(tmp_path / "secret.safetensors", {})
    for name in EVIL_FILES:
        (folder / name).write_text(EVIL_CODE)
    (folder / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch PWNED ../PWNED'\ntR.")
    return folder


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8", "int4"])
def test_sound_folder_loads_and_its_pickles_and_code_stay_unread(
    loader: Loader, folder: Path, dtype: str
):
    outcome = loader.load(folder, dtype=dtype)

    assert outcome.error is None, outcome.message
    assert not marks(folder.parent, loader.root)


@pytest.mark.parametrize("name", tensors.SOUND)
@pytest.mark.parametrize("dtype", ["f32", "int4"])
def test_sound_quantised_folder_loads(loader: Loader, folder: Path, name: str, dtype: str):
    tensors.SOUND[name](folder)

    outcome = loader.load(folder, dtype=dtype)

    assert outcome.error is None, outcome.message


@pytest.mark.parametrize("name", CASES)
def test_lie_ends_in_a_named_error(loader: Loader, folder: Path, name: str):
    case = CASES[name]
    case.spoil(folder)

    outcome = loader.load(folder, dtype=case.dtype)
    remove(folder)

    assert not marks(folder.parent, loader.root)
    assert outcome.named, outcome
    if case.error != LOADS:
        assert outcome.error is not None
        assert case.error in (ANY, outcome.error), outcome
        assert [part for part in case.says if part not in outcome.message] == [], outcome
    assert len(outcome.message) < 3000
    assert outcome.cpu_s < MOST_CPU_S
    assert outcome.grown < MOST_GROWN_BYTES


@pytest.mark.parametrize(
    "case", ["tensor_missing", "nan_float32_embed_tokens_bf16", "awq_packed_shape"]
)
def test_refused_model_leaves_nothing_in_the_cache(loader: Loader, folder: Path, case: str):
    before = kept(loader)
    CASES[case].spoil(folder)

    outcome = loader.load(folder, dtype="int8")

    assert outcome.error == "CorruptModel"
    assert kept(loader) == before


def kept(loader: Loader) -> set[Path]:
    """Return what is in the cache, but for hashes of whole files and the compiler's folder."""
    found = {path.relative_to(loader.cache) for path in loader.cache.rglob("*")}
    return {path for path in found if path.parts[0] not in ("hashes", "xla")}


def marks(*folders: Path) -> list[Path]:
    return [mark for folder in folders for mark in folder.rglob("PWNED")]


def remove(folder: Path) -> None:
    """Free what a case wrote, of which there are gigabytes in all."""
    shutil.rmtree(folder)
