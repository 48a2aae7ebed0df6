from dataclasses import replace

import jax.numpy as jnp
import pytest

from pals.models.config import AttentionConfig
from pals.models.kernels import paged
from pals.models.kernels.trial import try_kernel
from pals.models.numerics import Numerics
from pals.models.walk import Sums

LAYER = AttentionConfig(num_heads=6, num_kv_heads=2, head_dim=16, scale=0.25, window=4096)
F32 = Numerics(compute=jnp.dtype(jnp.float32))


def test_a_kernel_that_computes_the_same_passes():
    bf16 = replace(F32, compute=jnp.dtype(jnp.bfloat16))
    assert try_kernel("mosaic", LAYER, bf16, 64, interpret=True) is None


@pytest.mark.parametrize("value", [0, float("nan")])
def test_a_kernel_that_computes_something_else_is_found_out(monkeypatch, value):
    def run(task, queries, cache, tables, *, interpret):
        ones = jnp.ones(queries.shape, jnp.float32)
        return Sums(most=ones[..., :1], total=ones[..., :1], mixed=ones * value)

    monkeypatch.setitem(paged.RUN, "triton", run)

    assert "the kernel is off by" in try_kernel("triton", LAYER, F32, 64)


def test_a_device_that_compiles_no_kernels_is_said_to():
    assert "does not compile here" in try_kernel("mosaic", LAYER, F32, 64)
