import dataclasses
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pals.errors import CorruptModel
from pals.models import safetensors
from pals.models.build import AbstractModel
from pals.models.family import family_of
from pals.models.numerics import Numerics
from pals.models.snapshot import Snapshot
from pals.models.weights import WeightSource, name_problems, parameter_pieces
from pals.types import LayerRange
from tests.checkpoints import llama_shapes, make_llama_checkpoint, random_weights, write_weights

SHAPES = {
    "num_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "q_size": 64,
    "kv_size": 32,
    "vocab_size": 259,
    "tied": True,
    "attention_bias": False,
    "mlp_bias": False,
}


def load(folder, layers, dtype=jnp.float32):
    """Return the loaded parameters by the names of their tensors."""
    snapshot = Snapshot.open(folder, "test/model")
    numerics = Numerics(compute=jnp.dtype(dtype))
    model = AbstractModel.build(snapshot.config, layers, numerics)
    weights, table = snapshot.weights(), family_of(snapshot.config).weights
    source = WeightSource(weights, snapshot.config, layers, table, model.parameters)
    leaves = dict(source.load(model.parameters, group_size=128))
    present = set(weights.file_of)
    return {
        parameter_pieces(path, leaf.shape, snapshot.config, layers, table, present)[0].source: leaf
        for path, leaf in leaves.items()
    }


def change_weights(folder, change):
    weights = random_weights(llama_shapes(**SHAPES), seed=0, dtype=np.float32)
    change(weights)
    write_weights(folder, weights)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_source_dtype_is_cast_to_the_compute_dtype(tmp_path, dtype):
    folder = make_llama_checkpoint(tmp_path, num_layers=2, dtype=dtype)
    shapes = llama_shapes(**(SHAPES | {"num_layers": 2}))
    written = random_weights(shapes, seed=0, dtype=dtype)

    for compute in (jnp.float32, jnp.bfloat16):
        loaded = load(folder, LayerRange(0, 2), compute)
        assert loaded.keys() == written.keys()
        for name, array in loaded.items():
            np.testing.assert_array_equal(np.asarray(array), written[name].astype(compute))


@pytest.mark.parametrize("files", [1, 3])
def test_middle_shard_reads_the_bytes_of_its_layers_only(tmp_path, monkeypatch, files):
    folder = make_llama_checkpoint(tmp_path, num_layers=6, files=files)
    sizes = []
    read = os.preadv

    def counting(handle, buffers, offset):
        sizes.append(read(handle, buffers, offset))
        return sizes[-1]

    monkeypatch.setattr(safetensors.os, "preadv", counting)
    loaded = load(folder, LayerRange(2, 3))

    weight_bytes = sum(array.nbytes for array in loaded.values())
    header_bytes = 16 * 1024 * files
    assert weight_bytes <= sum(sizes) <= weight_bytes + header_bytes


def test_ends_are_held_by_head_and_tail_only(tmp_path):
    folder = make_llama_checkpoint(tmp_path, num_layers=3, tied=False)
    ends = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}

    held = [ends & load(folder, LayerRange(i, i + 1)).keys() for i in range(3)]

    assert held == [
        {"model.embed_tokens.weight"},
        set(),
        {"model.norm.weight", "lm_head.weight"},
    ]


def test_tied_head_of_a_lone_tail_is_the_embedding(tmp_path):
    folder = make_llama_checkpoint(tmp_path, num_layers=2, tied=True)

    assert "model.embed_tokens.weight" in load(folder, LayerRange(1, 2))
    assert "lm_head.weight" not in load(folder, LayerRange(0, 2))


def test_all_problems_are_told_at_once(tmp_path):
    folder = make_llama_checkpoint(tmp_path, num_layers=3)

    def change(weights):
        del weights["model.norm.weight"]
        weights["model.layers.1.self_attn.q_norm.weight"] = np.ones(4, np.float32)
        weights["model.layers.1.mlp.up_proj.weight"] = np.ones((4, 4), np.float32)

    change_weights(folder, change)
    with pytest.raises(CorruptModel) as caught:
        load(folder, LayerRange(1, 3))

    problem = caught.value.fields["problem"]
    assert "`model.norm.weight` is missing" in problem
    assert "`model.layers.1.self_attn.q_norm.weight` is unexpected" in problem
    assert "`model.layers.1.mlp.up_proj.weight` has shape [4, 4] instead of [96, 64]" in problem


@pytest.mark.parametrize("name", ["model.layers.3.extra", "model.vision.weight", "model.layers.x"])
def test_weight_of_no_shard_is_unexpected(tmp_path, name):
    folder = make_llama_checkpoint(tmp_path, num_layers=3)
    change_weights(folder, lambda weights: weights.update({name: np.ones(1, np.float32)}))

    with pytest.raises(CorruptModel) as caught:
        load(folder, LayerRange(0, 1))
    assert name in caught.value.fields["problem"]


def test_weights_of_old_exports_that_are_computed_are_left_alone(tmp_path):
    folder = make_llama_checkpoint(tmp_path, num_layers=3)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
        "lm_head.weight": np.ones((259, 64), np.float32),
    }
    change_weights(folder, lambda weights: weights.update(extra))

    assert not extra.keys() & load(folder, LayerRange(0, 3)).keys()


def test_parameters_are_on_the_device(tmp_path):
    folder = make_llama_checkpoint(tmp_path, num_layers=1)

    assert all(isinstance(a, jax.Array) for a in load(folder, LayerRange(0, 1)).values())


def test_layers_for_multi_token_prediction_are_left_alone(tmp_path):
    config = Snapshot.open(make_llama_checkpoint(tmp_path), "test/model").config
    shard, table = LayerRange(2, 4), family_of(config).weights
    present = {"model.layers.4.eh_proj.weight", "model.layers.5.eh_proj.weight"}

    problems = name_problems(
        present, set(), dataclasses.replace(config, num_mtp_layers=1), shard, table
    )

    assert problems == ["`model.layers.5.eh_proj.weight` is unexpected"]
