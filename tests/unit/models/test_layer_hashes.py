from pathlib import Path

import numpy as np
import pytest

from pals.errors import CorruptModel
from pals.models import layer_hashes as module
from pals.models.layer_hashes import layer_hashes
from pals.models.safetensors import WeightFiles, read_header
from pals.types import LayerRange
from tests import checkpoints

WHOLE = LayerRange(0, 4)


def hashes_of(folder: Path, layers: LayerRange = WHOLE) -> list[bytes]:
    return layer_hashes(WeightFiles.open(folder), layers)


def changed(folder: Path, name: str, value: np.ndarray | None) -> Path:
    """Rewrite the weights with one tensor added, replaced or taken away."""
    file = folder / "model.safetensors"
    tensors = {n: e.read() for n, e in read_header(file).items()}
    tensors = tensors | {name: value} if value is not None else tensors
    checkpoints.write_safetensors(file, {n: t for n, t in tensors.items() if t is not None})
    return folder


def test_a_layer_s_hash_does_not_depend_on_the_files_nor_on_their_order(tmp_path: Path):
    one = hashes_of(checkpoints.make_llama_checkpoint(tmp_path / "one"))
    three = hashes_of(checkpoints.make_llama_checkpoint(tmp_path / "three", files=3))
    assert one == three
    assert len({*one}) == 4
    assert {len(digest) for digest in one} == {32}
    assert hashes_of(tmp_path / "three", LayerRange(1, 3)) == one[1:3]


@pytest.mark.parametrize("change", ["byte", "dtype", "shape", "name"])
def test_any_change_of_a_layer_changes_its_hash_alone(tmp_path: Path, change: str):
    folder = checkpoints.make_llama_checkpoint(tmp_path / "tiny")
    before = hashes_of(folder)
    name = "model.layers.2.mlp.up_proj.weight"
    value = read_header(folder / "model.safetensors")[name].read()
    if change == "byte":
        value = value.copy()
        value[0, 0] = -value[0, 0]
    elif change == "dtype":
        value = value.view(np.float16)
    elif change == "shape":
        value = value.reshape(-1)
    else:
        name, value = "model.layers.2.more", np.zeros(1, np.float32)
    after = hashes_of(changed(folder, name, value))
    differing = [layer for layer in range(4) if before[layer] != after[layer]]
    assert differing == [2]


def test_a_hash_is_computed_once_for_as_long_as_the_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = checkpoints.make_llama_checkpoint(tmp_path / "tiny")
    before = hashes_of(folder)
    monkeypatch.setattr(module, "hash_tensor", lambda entry: pytest.fail("it was read again"))
    assert hashes_of(folder) == before


def test_a_layer_without_tensors_has_no_hash(tmp_path: Path):
    folder = checkpoints.make_llama_checkpoint(tmp_path / "tiny")
    with pytest.raises(CorruptModel, match="layer 4"):
        hashes_of(folder, LayerRange(3, 5))
