"""Weights are read and quantised in blocks of rows, which shows in the memory only."""

import os

import numpy as np
import pytest

from pals.errors import CorruptModel
from pals.models import safetensors, weights
from pals.models.build import AbstractModel
from pals.models.family import family_of
from pals.models.numerics import Numerics
from pals.models.quantize import quantize_int4, quantize_int8
from pals.models.safetensors import read_header
from pals.models.snapshot import Snapshot
from pals.models.table import Fused, WeightTable, transpose
from pals.models.weights import WeightSource
from pals.types import LayerRange, Quantization
from tests.checkpoints import (
    VOCAB_SIZE,
    make_llama_checkpoint,
    make_qwen3_moe_checkpoint,
    write_safetensors,
    write_weights,
)
from tests.quantized_checkpoints import FORMATS, GROUP_SIZE, rewrite

LAYERS = LayerRange(0, 2)
PLAIN = Numerics.of("f32")
KINDS = {
    "f32": PLAIN,
    "bf16": Numerics.of("bf16"),
    "int8": Numerics.of("int8"),
    "int4": Numerics.of("int4", Quantization(group_size=GROUP_SIZE)),
}
EXPERTS, EXPERT_SIZE, HIDDEN = 4, 32, 64
TRANSPOSED = WeightTable(
    layer={
        f"mlp.experts.{name}.weight": (
            Fused(f"mlp.experts.{name}", transposed=True, change=transpose),
        )
        for name in ("gate_up_proj", "down_proj")
    }
)


def load(folder, numerics=PLAIN, table=None):
    """Return the arrays of the whole model by their names."""
    snapshot = Snapshot.open(folder, "test/model")
    config = snapshot.config
    wanted, logical = (
        AbstractModel.build(config, LAYERS, n).parameters for n in (numerics, numerics.plain)
    )
    table = table or family_of(config).weights
    source = WeightSource(snapshot.weights(), config, LAYERS, table, logical)
    loaded = source.load(wanted, group_size=numerics.group_size)
    return {".".join(map(str, path)): np.asarray(leaf) for path, leaf in loaded}


def read_all(folder):
    return {n: e.read() for n, e in read_header(folder / "model.safetensors").items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def assert_nearly_equal(found, expected):
    """Compare int8 weights, whose rotation may differ in the last bit: BLAS has other code
    for few rows than for many.
    """
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        if name.endswith(".values"):
            steps = np.abs(found[name].astype(np.int16) - array)
            assert steps.max() <= 1
            assert np.count_nonzero(steps) <= array.size / 1000
        elif name.endswith(".scales"):
            np.testing.assert_allclose(found[name], array, rtol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], array, err_msg=name)


def tensor_reads(sizes, folder):
    """Return the sizes of reads but for that of the header."""
    header_bytes = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    return [size for size in sizes if size != header_bytes]


@pytest.fixture
def reads(monkeypatch):
    """The sizes of what is read at a time."""
    sizes = []
    preadv = os.preadv

    def recording(handle, buffers, offset):
        sizes.append(preadv(handle, buffers, offset))
        return sizes[-1]

    monkeypatch.setattr(safetensors.os, "preadv", recording)
    return sizes


# --- blocks --------------------------------------------------------------------------


def make_stored(folder, name):
    """Write a model whose matrices are in a format; ``plain`` is that of the source."""
    source = make_qwen3_moe_checkpoint(folder / "source")
    if name == "plain":
        return source
    rewrite(source, folder / "stored", folder / "plain", FORMATS[name])
    return folder / "stored"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", ["plain", *FORMATS])
@pytest.mark.parametrize("rows", [1, 7])
def test_blocks_of_any_size_give_the_same_arrays(tmp_path, monkeypatch, reads, kind, stored, rows):
    folder = make_stored(tmp_path, stored)
    whole = load(folder, KINDS[kind])
    count = len(reads)
    reads.clear()

    monkeypatch.setattr(weights, "BLOCK_BYTES", rows * HIDDEN * 4)
    blocks = load(folder, KINDS[kind])

    if kind == "int8":
        assert_nearly_equal(blocks, whole)
    else:
        assert_equal(blocks, whole)
    if stored == "plain":
        assert len(reads) > 5 * count
        assert max(tensor_reads(reads, folder)) <= rows * HIDDEN * 4


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_the_last_block_of_a_matrix_is_named(tmp_path, monkeypatch, kind):
    folder = make_llama_checkpoint(tmp_path, num_layers=2)
    tensors = read_all(folder)
    tensors["model.layers.1.mlp.down_proj.weight"][-1, -1] = np.nan
    write_safetensors(folder / "model.safetensors", tensors)
    monkeypatch.setattr(weights, "BLOCK_BYTES", 4 * 96 * 4)

    with pytest.raises(CorruptModel, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        load(folder, KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", FORMATS)
def test_nan_among_the_scales_of_a_format_is_named(tmp_path, monkeypatch, kind, stored):
    source = make_llama_checkpoint(tmp_path / "source", num_layers=2)
    rewrite(source, tmp_path / "stored", tmp_path / "plain", FORMATS[stored])
    tensors = read_all(tmp_path / "stored")
    (scales,) = (
        array
        for name, array in tensors.items()
        if name.startswith("model.layers.1.mlp.down_proj.") and "scale" in name
    )
    scales[-1, -1] = np.nan
    write_safetensors(tmp_path / "stored" / "model.safetensors", tensors)
    monkeypatch.setattr(weights, "BLOCK_BYTES", 8 * 96 * 4)

    with pytest.raises(CorruptModel, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        load(tmp_path / "stored", KINDS[kind])


# --- experts -------------------------------------------------------------------------


def stacked(tensors, layer=1):
    """Return the experts' matrices of a layer of a checkpoint that has one for each."""
    prefix = f"model.layers.{layer}.mlp.experts."
    gate, up, down = (
        np.stack([tensors[f"{prefix}{expert}.{name}_proj.weight"] for expert in range(EXPERTS)])
        for name in ("gate", "up", "down")
    )
    return {"gate_up_proj": np.concatenate([gate, up], axis=1), "down_proj": down}


def fuse(source, folder, change):
    """Write the checkpoint with the experts of each layer in one tensor a matrix."""
    tensors = read_all(source)
    fused = {name: array for name, array in tensors.items() if ".experts." not in name}
    for layer in range(len(LAYERS)):
        for name, array in stacked(tensors, layer).items():
            fused[f"model.layers.{layer}.mlp.experts.{name}"] = change(array)
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    write_weights(folder, fused)
    return folder


def unfused(array):
    return array


def transposed(array):
    return np.ascontiguousarray(array.swapaxes(1, 2))


LAYOUTS = {"each": None, "fused": (unfused, None), "transposed": (transposed, TRANSPOSED)}


@pytest.fixture(params=LAYOUTS)
def experts(request, tmp_path):
    """Return a checkpoint, its table and the experts' matrices of its layer 1."""
    source = make_qwen3_moe_checkpoint(tmp_path / "source")
    matrices = stacked(read_all(source))
    if LAYOUTS[request.param] is None:
        return source, None, matrices
    change, table = LAYOUTS[request.param]
    return fuse(source, tmp_path / "fused", change), table, matrices


@pytest.mark.parametrize("kind", KINDS)
def test_experts_of_every_layout_are_those_of_the_stacked_matrix(experts, kind):
    folder, table, matrices = experts
    loaded = load(folder, KINDS[kind], table)

    for name, matrix in matrices.items():
        parameter = f"layers.1.mlp.experts.{name}.weight"
        if kind == "int8":
            parts = [quantize_int8(expert)._asdict() for expert in matrix]
        elif kind == "int4":
            parts = [quantize_int4(expert, GROUP_SIZE)._asdict() for expert in matrix]
        else:
            expected = matrix.astype(KINDS[kind].compute)
            np.testing.assert_array_equal(loaded[parameter], expected)
            continue
        for leaf in parts[0]:
            expected = np.stack([part[leaf] for part in parts])
            np.testing.assert_array_equal(loaded[f"{parameter}.{leaf}"], expected)


def test_experts_are_read_one_by_one(experts, reads):
    folder, table, _ = experts
    load(folder, table=table)

    ends_bytes = VOCAB_SIZE * HIDDEN * 4
    inner = [size for size in tensor_reads(reads, folder) if size != ends_bytes]
    assert max(inner) == 2 * EXPERT_SIZE * HIDDEN * 4
