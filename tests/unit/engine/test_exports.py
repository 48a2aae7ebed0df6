"""The steps of a shard, as one program for all of its layers, exported for cuda and tpu."""

import re

import jax.numpy as jnp
import pytest

from pals.models.grouped import BATCH_BLOCKS
from pals.models.kernels.choice import KERNELS
from pals.types import LayerRange
from tests.unit.engine.exports import MIXED, TRITON, export_step
from tests.unit.models.tiny_configs import OWN_KEYS, tiny_config

PLATFORMS = {"gpu": "cuda", "tpu": "tpu"}
HEAD, MIDDLE, TAIL = (LayerRange(start, start + 1) for start in range(3))
ON_ALL = pytest.mark.parametrize("platform", PLATFORMS)
BATCHED_EXPERTS = re.compile(rf"dot_general .*, tensor<{BATCH_BLOCKS}x64x32xbf16>\)")
"""The experts of several blocks at a time, multiplied by their last matrices."""
FIRST_EXPERTS = {
    **dict.fromkeys(("deepseek_v3", "glm4_moe", "kimi_k2", "qwen3_moe"), 1),
    **dict.fromkeys(("gpt_oss", "mixtral"), 0),
}
"""The first layer that has some, in the tiny model of each family that does."""
IN_INTEGERS = re.compile(r"dot_general .*xi8>\)")
"""What only processors do with quantised weights."""
CACHED = ((2, 9, 16, 16), jnp.bfloat16)
"""Keys or values of one layer, which only processors keep as other numbers."""
KERNEL_CALLS = {"gpu": TRITON, "tpu": "tpu_custom_call"}


WITH_TRITON = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)
"""From jax 0.12 on, which has no other one for GPUs before NVIDIA's H100; see docs/decisions.md."""


def check(exported, platform, layers, *, hidden=jnp.bfloat16):
    """Check what goes in and comes out, for a platform."""
    assert exported.platforms == (PLATFORMS[platform],)
    states = ((MIXED.tokens, 64), hidden)
    inputs = [(aval.shape, aval.dtype) for aval in exported.in_avals]
    outputs = [(aval.shape, aval.dtype) for aval in exported.out_avals]
    assert (states in inputs) == (layers != HEAD)
    assert (((MIXED.tokens,), jnp.int32) in inputs) == (layers == HEAD)
    assert (states in outputs) == (layers != TAIL)
    sampled = MIXED.rows + 1
    assert (((sampled,), jnp.int32) in outputs) == (layers == TAIL)
    assert "tf.aliasing_output" in exported.mlir_module()  # the cache is given away


@ON_ALL
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_dense_and_moe_steps_are_exported(model_type, platform):
    exported = export_step(tiny_config(model_type), MIDDLE, platform, "bf16")

    check(exported, platform, MIDDLE)
    module = exported.mlir_module()
    is_sparse = model_type == "qwen3_moe"
    assert (KERNEL_CALLS["tpu"] in module) == (is_sparse and platform == "tpu")
    assert (BATCHED_EXPERTS.search(module) is not None) == (is_sparse and platform == "gpu")
    cached = [(aval.shape, aval.dtype) for aval in exported.in_avals].count(CACHED)
    assert cached == 2


@ON_ALL
@pytest.mark.parametrize("layers", [HEAD, TAIL], ids=["head", "tail"])
def test_heads_and_tails_are_exported(layers, platform):
    check(export_step(tiny_config("llama"), layers, platform, "bf16"), platform, layers)


@ON_ALL
@WITH_TRITON
def test_kernels_are_exported(platform):
    exported = export_step(tiny_config("gpt_oss"), HEAD, platform, "bf16", KERNELS[platform])

    check(exported, platform, HEAD)
    called = re.findall(r"custom_call @(\S+)\(", exported.mlir_module())
    # For the rows and for the chunk; on TPUs experts take two products of a kernel, too.
    assert called.count(KERNEL_CALLS[platform]) == (4 if platform == "tpu" else 2)


@pytest.mark.slow
@ON_ALL
@pytest.mark.parametrize("layers", [HEAD, MIDDLE, TAIL], ids=["head", "middle", "tail"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("model_type", OWN_KEYS)
def test_every_family_is_exported_in_every_dtype(model_type, dtype, layers, platform):
    exported = export_step(tiny_config(model_type), layers, platform, dtype)

    check(exported, platform, layers, hidden=jnp.float32 if dtype == "f32" else jnp.bfloat16)
    module = exported.mlir_module()
    assert IN_INTEGERS.search(module) is None
    has_experts = layers.start >= FIRST_EXPERTS.get(model_type, 3)
    assert ("chlo.ragged_dot" in module) == (has_experts and (platform, dtype) == ("tpu", "f32"))


@pytest.mark.slow
@ON_ALL
@WITH_TRITON
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt_oss", "llama", "mistral", "qwen3_moe"])
def test_every_view_is_exported_with_kernels(model_type, dtype, platform):
    exported = export_step(tiny_config(model_type), MIDDLE, platform, dtype, KERNELS[platform])

    assert KERNEL_CALLS[platform] in exported.mlir_module()
