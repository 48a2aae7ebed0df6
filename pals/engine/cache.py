"""The KV cache of a shard: its shape, and what each slot of it holds."""
# pyright: reportUnknownMemberType=false
# (jax annotates its functions with types that pyright sees as partially unknown)

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pals.errors import InvalidStep
from pals.models.attention import storage_dtype
from pals.models.config import ModelConfig
from pals.models.decoder import Cache
from pals.types import EngineLimits, LayerRange

MIN_CHUNK_BUCKET = 16

AbstractCache = tuple[tuple[jax.ShapeDtypeStruct, ...], ...]


def cache_positions(limits: EngineLimits) -> int:
    """Return the positions of one slot: the context and a margin for padding.

    A chunk is padded to less than twice its length, so padding reaches at most half the
    largest bucket past the context; without the margin XLA would shift such a write back
    over real positions.
    """
    return limits.max_context_tokens + max(MIN_CHUNK_BUCKET, limits.max_chunk_tokens // 2)


def abstract_cache(
    config: ModelConfig, layers: LayerRange, *, limits: EngineLimits, dtype: jnp.dtype
) -> AbstractCache:
    """Return the shapes of the cache, [slots, K, C, H] for each array that a layer keeps."""
    stored = storage_dtype(dtype)
    positions = cache_positions(limits)
    return tuple(
        tuple(
            jax.ShapeDtypeStruct((limits.max_sessions, heads, positions, width), stored)
            for heads, width in config.cache_shapes(layer)
        )
        for layer in range(layers.start, layers.stop)
    )


def build_cache(
    config: ModelConfig,
    layers: LayerRange,
    *,
    limits: EngineLimits,
    dtype: jnp.dtype,
    mesh: Mesh | None = None,
) -> Cache:
    """Allocate zeros in the shapes of `abstract_cache`, whole on each device of ``mesh``."""
    place = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return tuple(
        tuple(jnp.zeros(array.shape, array.dtype, device=place) for array in arrays)
        for arrays in abstract_cache(config, layers, limits=limits, dtype=dtype)
    )


class SlotLengths:
    """How many tokens each slot holds of its present session.

    A session begins at position 0 and may step back, but never past what it wrote: beyond
    that lie the tokens of the slot's former session.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self._lengths = [0] * limits.max_sessions
        self._max_context_tokens = limits.max_context_tokens

    def check(self, slot: int, position: int, tokens: int) -> None:
        """Raise unless ``tokens`` may be written at ``position``.

        Raises:
            InvalidStep: The slot does not exist, or the positions leave a gap or the context.
        """
        if not 0 <= slot < len(self._lengths):
            raise InvalidStep(problem=f"slot {slot} is not one of {len(self._lengths)}")
        if not 0 <= position <= self._lengths[slot]:
            raise InvalidStep(
                problem=f"position {position} in slot {slot}, which holds {self._lengths[slot]}"
            )
        if position + tokens > self._max_context_tokens:
            raise InvalidStep(
                problem=f"{tokens} tokens at position {position} leave the context of "
                f"{self._max_context_tokens}"
            )

    def advance(self, slot: int, position: int, tokens: int) -> None:
        self._lengths[slot] = position + tokens
