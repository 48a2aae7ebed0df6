"""What the ways to compile a step have in common: its arguments, and what its tail samples."""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (jax annotates its functions with types that pyright sees as partially unknown)

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from pals.engine.bank import Bank
from pals.engine.buckets import Program
from pals.engine.compilation import CompilerOptions
from pals.engine.sampler import sample
from pals.engine.work import Sampled
from pals.models.decoder import Cache, Decoder
from pals.models.paged import StepShape, Tables

Leaves = tuple[jax.Array, ...]


class StepArguments(NamedTuple):
    """The arguments of a step: arrays, or the shapes of some.

    Attributes:
        leaves: The parameters of a shard.
        cache: Given away.
        bank: At the tail; given away.
        inputs: Token ids [M] at the head, else hidden states [M, D].
        tables: Where the rows stand.
        sampling: At the tail, of each token that is sampled.
    """

    leaves: tuple[Any, ...]
    cache: tuple[Any, ...]
    bank: Any
    inputs: Any
    tables: Tables
    sampling: Any


class StepOutcome(NamedTuple):
    """What a step gives back.

    Attributes:
        output: Hidden states [M, D], or at the tail what was sampled.
        cache: With the step's tokens.
        bank: With what was sampled.
        pooled: At the tail, of a step with a chunk: `pool_chunk` of it.
    """

    output: jax.Array | Sampled
    cache: Cache
    bank: Bank | None
    pooled: jax.Array | None


class Run(Protocol):
    """A compiled step."""

    def __call__(self, arguments: StepArguments) -> StepOutcome:
        """Start the step; its outputs are waited for by whoever reads them."""
        ...


class StepBuilder(Protocol):
    """A way to compile steps."""

    def compile(
        self, arguments: StepArguments, shape: StepShape, options: CompilerOptions | None
    ) -> tuple[Run, int]:
        """Compile a step of such arguments.

        Returns:
            It, and the bytes of its temporaries.
        """
        ...


def step_shape(program: Program) -> StepShape:
    """Return how a program divides its tokens into rows."""
    return StepShape(program.rows, program.row_tokens, program.chunk_tokens)


def sample_step(
    model: Decoder,
    bank: Bank,
    x: jax.Array,
    tables: Tables,
    sampling: jax.Array,
    shape: StepShape,
) -> tuple[Sampled, Bank]:
    """Sample after the last layer's hidden states [M, D] of a step."""
    logits, positions = tail_logits(model, x, tables, shape)
    return sample(logits, sampling, positions, bank)


def tail_logits(
    model: Decoder, x: jax.Array, tables: Tables, shape: StepShape
) -> tuple[jax.Array, jax.Array]:
    """Return of each token that is sampled the logits [S, V], and where it will stand [S]."""
    logits = model.forward_logits(take_sampled(x, shape, tables))
    return logits, sampled_positions(shape, tables)


def pool_chunk(model: Decoder, x: jax.Array, tables: Tables, shape: StepShape) -> jax.Array | None:
    """Return the sum [D] of the chunk's hidden states after the final norm, in float32.

    Args:
        model: With the final norm.
        x: Hidden states [M, D] of a step.
        tables: Where its rows stand.
        shape: How its tokens are divided into rows.
    """
    if not shape.chunk_tokens:
        return None
    states = model.normalise(x[shape.short_tokens :]).astype(jnp.float32)
    counted = jnp.arange(shape.chunk_tokens) < tables.lengths[-1]
    return jnp.where(counted[:, None], states, 0).sum(axis=0)


def sampled_rows(shape: StepShape) -> int:
    """Return how many tokens the tail samples in a step, S: all but those within a chunk."""
    return shape.short_tokens + bool(shape.chunk_tokens)


def take_sampled(x: jax.Array, shape: StepShape, tables: Tables) -> jax.Array:
    """Return of [M, D] each token of short rows and the last one of the chunk, [S, D]."""
    short = x[: shape.short_tokens]
    if not shape.chunk_tokens:
        return short
    last = shape.short_tokens + jnp.maximum(tables.lengths[-1] - 1, 0)
    return jnp.concatenate([short, jax.lax.dynamic_slice_in_dim(x, last, 1)])


def sampled_positions(shape: StepShape, tables: Tables) -> jax.Array:
    """Return where the sampled tokens will stand, [S] int32."""
    offsets = jnp.arange(1, shape.row_tokens + 1, dtype=jnp.int32)
    short = (tables.starts[: shape.rows, None] + offsets).reshape(-1)
    if not shape.chunk_tokens:
        return short
    return jnp.concatenate([short, tables.starts[-1:] + tables.lengths[-1:]])
