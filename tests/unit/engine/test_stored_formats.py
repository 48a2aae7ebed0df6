"""Checkpoints in fp8, AWQ and GPTQ are exactly the model that they stand for."""

import numpy as np
import pytest

from pals.models.build import AbstractModel
from pals.models.loading import load_shard_parameters
from pals.models.numerics import Numerics
from pals.models.quantize import Int4Matrix, dequantize_int4
from pals.models.snapshot import Snapshot
from pals.types import LayerRange, Quantization
from tests.checkpoints import make_llama_checkpoint, make_qwen3_moe_checkpoint
from tests.quantized_checkpoints import FORMATS, GROUP_SIZE, rewrite
from tests.unit.engine.chains import generate, load_chain

MODELS = {"llama": make_llama_checkpoint, "qwen3_moe": make_qwen3_moe_checkpoint}
LAYERS = LayerRange(0, 2)
PROMPT = [256, *b"Tell me of numbers in few bits."]


@pytest.fixture
def snapshots(tmp_path, request):
    """The same model in a format and as float32."""
    model, name = request.param
    source = MODELS[model](tmp_path / "source", num_layers=2)
    rewrite(source, tmp_path / "stored", tmp_path / "plain", FORMATS[name])
    return [Snapshot.open(tmp_path / folder, "test/model") for folder in ("stored", "plain")]


def load(snapshot, numerics):
    parameters = AbstractModel.build(snapshot.config, LAYERS, numerics).parameters
    loaded = load_shard_parameters(snapshot, LAYERS, numerics, parameters)
    return {
        ".".join(map(str, path)): np.asarray(leaf)
        for path, leaf in zip(parameters, loaded.leaves, strict=True)
    }


@pytest.mark.parametrize(
    "snapshots", [(model, name) for model in MODELS for name in FORMATS], indirect=True, ids=str
)
def test_a_stored_format_is_the_dequantised_checkpoint_to_the_bit(snapshots):
    stored, plain = (load(snapshot, Numerics.of("f32")) for snapshot in snapshots)

    assert stored.keys() == plain.keys()
    for name, expected in plain.items():
        np.testing.assert_array_equal(stored[name], expected, err_msg=name)


@pytest.mark.parametrize(
    "snapshots",
    [("llama", "fp8"), ("qwen3_moe", "awq"), ("qwen3_moe", "gptq-act-order")],
    indirect=True,
    ids=str,
)
def test_a_stored_format_answers_as_the_dequantised_checkpoint(snapshots):
    stored, plain = (generate(load_chain(snapshot, [0, 1]), PROMPT) for snapshot in snapshots)

    assert stored == plain
    assert len(set(plain)) > 4


@pytest.mark.parametrize(
    "snapshots",
    [(model, name) for model in MODELS for name in ("awq", "gptq-v1", "gptq-v2")],
    indirect=True,
    ids=str,
)
def test_four_bit_codes_are_taken_over_at_their_own_group_size(snapshots):
    numerics = Numerics.of("int4", Quantization(group_size=GROUP_SIZE))
    codes, plain = load(snapshots[0], numerics), load(snapshots[1], Numerics.of("f32"))

    packed = [name.removesuffix(".packed") for name in codes if name.endswith(".packed")]
    assert len(packed) == (14 if "layers.0.mlp.gate_proj.weight" in plain else 12)
    for name in packed:
        leaves = [codes[f"{name}.{leaf}"] for leaf in ("packed", "scales", "zeros")]
        expected = plain[name].reshape(-1, *plain[name].shape[-2:])
        stacks = [leaf.reshape(len(expected), *leaf.shape[-3:]) for leaf in leaves[:1]]
        stacks += [leaf.reshape(len(expected), *leaf.shape[-2:]) for leaf in leaves[1:]]
        for matrix, *parts in zip(expected, *stacks, strict=True):
            found = dequantize_int4(Int4Matrix(*parts), matrix.shape[1])
            np.testing.assert_array_equal(found, matrix, err_msg=name)


@pytest.mark.parametrize("snapshots", [("llama", "gptq-act-order")], indirect=True, ids=str)
def test_four_bit_codes_out_of_order_are_quantised_again(snapshots):
    numerics = Numerics.of("int4", Quantization(group_size=GROUP_SIZE))
    stored, plain = (load(snapshot, numerics) for snapshot in snapshots)

    for name, expected in plain.items():
        np.testing.assert_array_equal(stored[name], expected, err_msg=name)
