# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# (jax annotates its functions with types that pyright sees as partially unknown)
"""Fills an array on a device block by block, without ever holding it twice.

On a CPU the blocks go into host memory that jax then takes over as it stands: it does so
where the memory is aligned to 64 bytes. Elsewhere each block goes to the device by
itself, into an array that gives its memory to its successor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax
from jax.sharding import Sharding, SingleDeviceSharding

HostArray = npt.NDArray[np.generic]
Region = tuple[slice, ...]
"""Elements of an array, with both ends on every axis."""

ALIGNMENT = 64
"""Bytes to which XLA's CPU client wants memory aligned that it does not copy."""


class Assembler:
    """One array in the making.

    Args:
        shape: Of the whole array.
        dtype: Blocks are cast to it.
        sharding: Over local devices; None puts the array on the default device. Each device
            gets its own part of a block only.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: npt.DTypeLike, *, sharding: Sharding | None = None
    ) -> None:
        self._shape = shape
        self._dtype = np.dtype(dtype)
        self._sharding = sharding or SingleDeviceSharding(jax.devices()[0])
        self._parts = self._make_parts()
        self._missing = math.prod(shape)

    def _make_parts(self) -> list[_Part]:
        indices = self._sharding.addressable_devices_indices_map(self._shape)
        parts: list[_Part] = []
        for device, index in indices.items():
            kind = _HostPart if device.platform == "cpu" else _DevicePart
            region = whole_region(index or (), self._shape)
            parts.append(kind(region, self._dtype, SingleDeviceSharding(device)))
        return parts

    def write(self, index: int | None, rows: slice, block: HostArray, *, axis: int = 0) -> None:
        """Fill some rows of the array, or of one entry of its first axis.

        Args:
            index: The entry; None where ``rows`` are those of the array itself.
            rows: Both ends are given. No element may be written twice.
            block: [rows, ...].
            axis: On which the rows lie, of the array or of the entry; those before it are
                filled whole.

        Raises:
            ValueError: The block does not fit its place.
        """
        inner = self._shape if index is None else self._shape[1:]
        if block.shape != (*inner[:axis], rows.stop - rows.start, *inner[axis + 1 :]):
            raise ValueError(f"a block of {block.shape} does not fit {rows} of {self._shape}")
        region = [slice(0, size) for size in inner]
        region[axis] = rows
        if index is not None:
            region, block = [slice(index, index + 1), *region], block[None]
        for part in self._parts:
            shared = intersection(region, part.region)
            if shared is not None:
                part.put(relative(shared, part.region), block[relative(shared, region)])
        self._missing -= block.size

    def finish(self) -> jax.Array:
        """Return the array; nothing can be written any more.

        Raises:
            ValueError: Elements are missing, or were written twice.
        """
        if self._missing:
            raise ValueError(f"{self._missing} elements of {self._shape} were not written once")
        parts, self._parts = self._parts, []
        return jax.make_array_from_single_device_arrays(
            self._shape, self._sharding, [part.take() for part in parts]
        )


def whole_region(index: Sequence[slice], shape: tuple[int, ...]) -> Region:
    """Return which elements an index of jax takes, with both ends on every axis."""
    given = [at.indices(size)[:2] for at, size in zip(index, shape, strict=False)]
    rest = [(0, size) for size in shape[len(given) :]]
    return tuple(slice(start, stop) for start, stop in given + rest)


def intersection(one: Sequence[slice], other: Sequence[slice]) -> Region | None:
    """Return what two regions share; None for nothing."""
    shared = tuple(
        slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True)
    )
    return shared if all(at.start < at.stop for at in shared) else None


def relative(region: Sequence[slice], origin: Sequence[slice]) -> Region:
    """Return a region as it is counted from the beginning of another."""
    return tuple(
        slice(at.start - start.start, at.stop - start.start)
        for at, start in zip(region, origin, strict=True)
    )


class _Part(Protocol):
    """What one device has of an array."""

    region: Region

    def put(self, region: Region, block: HostArray) -> None:
        """Fill a region, counted from the part's own beginning."""
        ...

    def take(self) -> jax.Array:
        """Return the part."""
        ...


class _HostPart:
    """A part in host memory, which the device takes over."""

    def __init__(self, region: Region, dtype: np.dtype, device: Sharding) -> None:
        self.region = region
        self._device = device
        self._array = aligned_empty(_sizes(region), dtype)

    def put(self, region: Region, block: HostArray) -> None:
        self._array[region] = block

    def take(self) -> jax.Array:
        return jax.device_put(self._array, self._device, may_alias=True)


class _DevicePart:
    """A part on the device, into which each block is written where it stands."""

    def __init__(self, region: Region, dtype: np.dtype, device: Sharding) -> None:
        self.region = region
        self._device = device
        self._array = jnp.zeros(_sizes(region), dtype, device=device)

    def put(self, region: Region, block: HostArray) -> None:
        block = np.ascontiguousarray(block, self._array.dtype)
        starts = tuple(np.int32(at.start) for at in region)
        self._array = _update(self._array, jax.device_put(block, self._device), starts)
        # Blocks that wait for their turn would pile up on the device.
        self._array.block_until_ready()

    def take(self) -> jax.Array:
        return self._array


def _sizes(region: Region) -> tuple[int, ...]:
    return tuple(at.stop - at.start for at in region)


@partial(jax.jit, donate_argnums=0)
def _update(array: jax.Array, block: jax.Array, starts: tuple[np.int32, ...]) -> jax.Array:
    return lax.dynamic_update_slice(array, block, starts)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> HostArray:
    """Return host memory that jax takes over on a CPU, its content undefined."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    offset = -memory.ctypes.data % ALIGNMENT
    return memory[offset : offset + size].view(dtype).reshape(shape)
