"""The KV cache of a shard: how many pages it has, and their shape."""
# pyright: reportUnknownMemberType=false
# (jax annotates its functions with types that pyright sees as partially unknown)

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pals.engine.budget import PLANNED_TOKENS
from pals.engine.pages import PageFormat, token_bytes
from pals.models.config import ModelConfig
from pals.models.decoder import Cache
from pals.models.paged import storage_dtype
from pals.models.spread import heads_of_device, place
from pals.types import EngineLimits, LayerRange

AbstractCache = tuple[tuple[jax.ShapeDtypeStruct, ...], ...]


def page_format(
    config: ModelConfig,
    layers: LayerRange,
    *,
    page_tokens: int,
    dtype: jnp.dtype,
    devices: int = 1,
) -> PageFormat:
    """Return the size of a page of all layers of a shard, on each of its devices."""
    shapes = [
        [(heads_of_device(heads, devices), width) for heads, width in config.cache_shapes(layer)]
        for layer in range(layers.start, layers.stop)
    ]
    size = token_bytes(shapes, element_bytes=dtype.itemsize)
    return PageFormat(page_tokens=page_tokens, token_bytes=size)


def kv_bytes(limits: EngineLimits, format_: PageFormat) -> int:
    """Return the bytes of the cache on each device: those named, or what is planned without."""
    if limits.kv_bytes is not None:
        return limits.kv_bytes
    sessions = limits.max_sessions * format_.pages_of(limits.max_context_tokens)
    pages = min(sessions, format_.pages_of(PLANNED_TOKENS))
    return (pages + 1) * format_.page_bytes


def abstract_cache(
    config: ModelConfig,
    layers: LayerRange,
    *,
    num_pages: int,
    page_tokens: int,
    dtype: jnp.dtype,
    platform: str,
    mesh: Mesh | None = None,
) -> AbstractCache:
    """Return the shapes of the cache, [K, P, p, W] for each array that a layer keeps.

    Args:
        config: Of the model.
        layers: Of the shard.
        num_pages: P, the scratch page included.
        page_tokens: p.
        dtype: In which the layers compute.
        platform: On which, as jax names it.
        mesh: Devices, each of which has its own heads; None for a single one. A head that
            several of them have is there several times.
    """
    stored = storage_dtype(dtype, platform)
    devices = 1 if mesh is None else mesh.size
    sharding = None if mesh is None else place(mesh, 0, ndim=4)

    def abstract(heads: int, width: int) -> jax.ShapeDtypeStruct:
        shape = (heads_of_device(heads, devices) * devices, num_pages, page_tokens, width)
        return jax.ShapeDtypeStruct(shape, stored, sharding=sharding)

    return tuple(
        tuple(abstract(heads, width) for heads, width in config.cache_shapes(layer))
        for layer in range(layers.start, layers.stop)
    )


def build_cache(shapes: AbstractCache) -> Cache:
    """Allocate zeros in the shapes and places of `abstract_cache`."""
    return tuple(
        tuple(jnp.zeros(array.shape, array.dtype, device=array.sharding) for array in arrays)
        for arrays in shapes
    )


def lone_cache(config: ModelConfig, layers: LayerRange, *, tokens: int, dtype: jnp.dtype) -> Cache:
    """Return a cache for one sequence of some tokens; see `pals.models.paged.lone_row`."""
    page_tokens = EngineLimits().page_tokens
    num_pages = 1 - (-tokens // page_tokens)
    shapes = abstract_cache(
        config,
        layers,
        num_pages=num_pages,
        page_tokens=page_tokens,
        dtype=dtype,
        platform=jax.default_backend(),
    )
    return build_cache(shapes)
