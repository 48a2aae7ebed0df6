"""Turns logits into tokens inside the tail's step, one row for each session.

The token of a row depends on its logits, its `Sampling` and its position only: never on
the other rows, nor on how the session was cut into steps.
"""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (jax annotates its functions with types that pyright sees as partially unknown)

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pals.errors import InvalidStep
from pals.types import Sampling

MAX_TEMPERATURE = 2.0
GREEDY = Sampling()

Array = TypeVar("Array")


class SamplingRows(NamedTuple, Generic[Array]):
    """The `Sampling` of each row as arrays.

    Attributes:
        temperature: [B] float32; 0 is greedy.
        top_p: [B] float32.
        seeds: [B, 2] uint32, the high and low halves of a 64-bit seed.
    """

    temperature: Array
    top_p: Array
    seeds: Array


def build_old(samplings: Sequence[Sampling], size: int) -> SamplingRows[np.ndarray]:
    """Return the arrays for ``size`` rows; those past ``samplings`` are greedy.

    Raises:
        InvalidStep: A temperature or top_p is out of its range.
    """
    for sampling in samplings:
        check_sampling(sampling)
    padded = [*samplings, *[GREEDY] * (size - len(samplings))]
    return SamplingRows(
        temperature=np.array([s.temperature for s in padded], np.float32),
        top_p=np.array([s.top_p for s in padded], np.float32),
        seeds=np.array(
            [[s.seed >> 32 & 0xFFFFFFFF, s.seed & 0xFFFFFFFF] for s in padded], np.uint32
        ),
    )


def check_sampling(sampling: Sampling) -> None:
    """Raise unless the values are finite and in range.

    Raises:
        InvalidStep: They are not.
    """
    temperature, top_p = sampling.temperature, sampling.top_p
    if not (math.isfinite(temperature) and 0 <= temperature <= MAX_TEMPERATURE):
        raise InvalidStep(problem=f"temperature {temperature} is not in [0, {MAX_TEMPERATURE}]")
    if not (math.isfinite(top_p) and 0 < top_p <= 1):
        raise InvalidStep(problem=f"top_p {top_p} is not in (0, 1]")


def sample_old(logits: jax.Array, rows: SamplingRows[jax.Array], positions: jax.Array) -> jax.Array:
    """Choose one token for each row.

    Args:
        logits: [B, V] float32.
        rows: How each row is sampled.
        positions: [B] int32, where the chosen tokens will stand.

    Returns:
        [B] int32.
    """

    def draw() -> jax.Array:
        scaled = logits / jnp.where(is_random, rows.temperature, 1.0)[:, None]
        has_nucleus = is_random & (rows.top_p < 1)
        kept = lax.cond(jnp.any(has_nucleus), keep_nucleus, keep_all, scaled, rows.top_p)
        return jnp.where(is_random, draw_tokens(kept, rows.seeds, positions), greedy)

    # The whole batch takes one branch: greedy batches pay for no random numbers, and only
    # top_p pays for its search. A row's token is the same in every branch that it may take.
    with jax.named_scope("sample"):
        is_random = rows.temperature > 0
        greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return lax.cond(jnp.any(is_random), draw, lambda: greedy)


def keep_all(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Return the logits [B, V] as they are."""
    del top_p
    return logits


def keep_nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Mask all but the fewest tokens that hold top_p (https://arxiv.org/abs/1904.09751).

    Tokens that tie with the least likely one kept are kept too. The least probability is
    found by bisecting its bits, 20 times faster than a sort on CPU: the bits of positive
    floats are ordered as the floats are.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) // 2
        least = lax.bitcast_convert_type(middle, jnp.float32)[:, None]
        mass = jnp.sum(jnp.where(probabilities >= least, probabilities, 0), axis=-1)
        enough = mass >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    rows = logits.shape[0]
    past_one = lax.bitcast_convert_type(jnp.float32(1.0), jnp.int32) + 1
    bounds = (jnp.zeros(rows, jnp.int32), jnp.full(rows, past_one))
    low, _ = lax.fori_loop(0, 31, halve, bounds)
    least = lax.bitcast_convert_type(low, jnp.float32)[:, None]
    # A sum of rounded numbers may reach 1 before the last token does.
    return jnp.where((probabilities >= least) | (top_p[:, None] >= 1), logits, -jnp.inf)


def draw_tokens(logits: jax.Array, seeds: jax.Array, positions: jax.Array) -> jax.Array:
    """Sample from the softmax by the Gumbel maximum (https://arxiv.org/abs/1611.01144)."""

    def draw_row(logits: jax.Array, seed: jax.Array, position: jax.Array) -> jax.Array:
        # threefry gives the same numbers on every device.
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
        return jnp.argmax(logits + jax.random.gumbel(key, logits.shape, jnp.float32))

    return jax.vmap(draw_row)(logits, seeds, positions).astype(jnp.int32)


from pals.engine.work import Sampled


def sample(logits, rows, positions, bank):
    ids = sample_old(logits, rows, positions)
    z = jnp.zeros(ids.shape, jnp.float32)
    return Sampled(
        ids, z, jnp.zeros((ids.shape[0], 20), jnp.int32), jnp.zeros((ids.shape[0], 20), jnp.float32)
    ), bank


def build_sampling_rows(samplings, size):
    return build_old([GREEDY if s is None else s.sampling for s in samplings], size)


def abstract_rows(size):
    return SamplingRows(
        jax.ShapeDtypeStruct((size,), jnp.float32),
        jax.ShapeDtypeStruct((size,), jnp.float32),
        jax.ShapeDtypeStruct((size, 2), jnp.uint32),
    )
