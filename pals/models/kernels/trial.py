# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""A kernel's trial on this machine's own device, before a shard relies on it.

Not every driver and device compiles what jax can lower, and nobody has seen all of them: a
kernel is used where a small step of it gives what plain XLA gives.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pals.models.config import AttentionConfig
from pals.models.numerics import Numerics, PallasKernel
from pals.models.paged import LayerCache, Rows, StepShape, Tables
from pals.models.walk import View, attend

SHAPE = StepShape(2, 1, 64)
"""Of the step: rows that decode, and a chunk."""

ROW_TOKENS = 1024
"""For which each row has pages: more than a kernel copies at a time, so that one copy runs
while another is computed with, and a window begins in a later one."""

WINDOW = 40
"""Of layers that have one, whose own would hide nothing."""

KEY_HEADS = 2

TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}
"""Between numbers of about 1: what the dtype rounds."""


def try_kernel(
    kernel: PallasKernel,
    attention: AttentionConfig,
    numerics: Numerics,
    page_tokens: int,
    *,
    interpret: bool = False,
) -> str | None:
    """Compare a kernel with plain XLA on this device.

    Args:
        kernel: For this device's platform.
        attention: Of a layer, whose number of heads does not matter.
        numerics: In which it computes.
        page_tokens: Of the cache.
        interpret: Compute the kernel with XLA operations.

    Returns:
        Why it cannot be used; None when it can.
    """
    view = View(scale=attention.scale, window=None if attention.window is None else WINDOW)
    queries, cache, rows = _draw(attention, numerics, page_tokens)

    def attend_both() -> tuple[jax.Array, jax.Array]:
        from pals.models.kernels.paged import attend_paged

        found = attend_paged(queries, cache, rows, view, kernel, interpret=interpret)
        return found, attend(queries, cache, rows, view)

    try:
        both = jax.device_get(jax.jit(attend_both)())
    # Compilers of three vendors stand behind this, each with errors of its own, and versions
    # of jax that lack one.
    except Exception as error:
        return f"the kernel does not compile here: {str(error)[:200]}"
    found, expected = (np.asarray(array, np.float32) for array in both)
    difference = np.max(np.abs(found - expected))
    if not difference <= TOLERANCES[numerics.compute.name]:
        return f"the kernel is off by {difference:.2g} here"
    return None


def _draw(
    attention: AttentionConfig, numerics: Numerics, page_tokens: int
) -> tuple[jax.Array, LayerCache, Rows]:
    """Return the queries, the cache and the rows of a step of random numbers."""
    random = np.random.default_rng(0)
    heads = KEY_HEADS * attention.num_heads // attention.num_kv_heads
    row_pages = ROW_TOKENS // page_tokens
    num_pages = 1 + SHAPE.batch * row_pages

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape), numerics.compute)

    pages = 1 + random.permutation(num_pages - 1).reshape(SHAPE.batch, row_pages)
    tables = Tables(
        starts=jnp.array([ROW_TOKENS - 1, 300, 500], jnp.int32),
        lengths=jnp.array([1, 1, SHAPE.chunk_tokens], jnp.int32),
        pages=jnp.asarray(pages, jnp.int32),
    )
    counted = jnp.ones(SHAPE.tokens, bool)
    queries = draw(SHAPE.tokens, heads, attention.head_dim)
    page_shape = (KEY_HEADS, num_pages, page_tokens, attention.head_dim)
    cache = (draw(*page_shape), draw(*page_shape))
    return queries, cache, Rows(tables=tables, counted=counted, rope=(), shape=SHAPE)
