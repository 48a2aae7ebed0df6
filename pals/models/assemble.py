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
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax
from jax.sharding import Sharding, SingleDeviceSharding

HostArray = npt.NDArray[np.generic]
Region = tuple[int | slice, ...]

ALIGNMENT = 64
"""Bytes to which XLA's CPU client wants memory aligned that it does not copy."""


class Assembler:
    """One array in the making.

    Args:
        shape: Of the whole array.
        dtype: Blocks are cast to it.
        sharding: Over local devices, of the first axis at most; None puts the array on the
            default device. Each device holds its own rows only.
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
            start, stop, _ = (index or (slice(None),))[0].indices(self._shape[0])
            shape = (stop - start, *self._shape[1:])
            if self._sharding.shard_shape(self._shape) != shape:
                raise ValueError(f"{self._sharding} splits more than the first axis")
            kind = _HostPart if device.platform == "cpu" else _DevicePart
            parts.append(kind(start, shape, self._dtype, SingleDeviceSharding(device)))
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
        before = tuple(slice(0, size) for size in inner[:axis])
        for part in self._parts:
            if index is not None:
                if part.start <= index < part.stop:
                    part.put((index - part.start, *before, rows), block)
            elif before:
                _check_whole(part, self._shape)
                part.put((*before, rows), block)
            else:
                _write_rows(part, rows, block)
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


def _write_rows(part: _Part, rows: slice, block: HostArray) -> None:
    first, last = max(rows.start, part.start), min(rows.stop, part.stop)
    if first < last:
        here = block[first - rows.start : last - rows.start]
        part.put((slice(first - part.start, last - part.start),), here)


def _check_whole(part: _Part, shape: tuple[int, ...]) -> None:
    if (part.start, part.stop) != (0, shape[0]):
        raise ValueError(f"{shape} is split over devices on the axis before its rows")


class _Part(Protocol):
    """The rows of one device, from ``start`` to before ``stop``."""

    start: int
    stop: int

    def put(self, region: Region, block: HostArray) -> None:
        """Fill a region, counted from ``start``."""
        ...

    def take(self) -> jax.Array:
        """Return the rows."""
        ...


class _HostPart:
    """Rows in host memory, which the device takes over."""

    def __init__(
        self, start: int, shape: tuple[int, ...], dtype: np.dtype, device: Sharding
    ) -> None:
        self.start = start
        self.stop = start + shape[0]
        self._device = device
        self._array = aligned_empty(shape, dtype)

    def put(self, region: Region, block: HostArray) -> None:
        self._array[region] = block

    def take(self) -> jax.Array:
        return jax.device_put(self._array, self._device, may_alias=True)


class _DevicePart:
    """Rows on the device, into which each block is written where it stands."""

    def __init__(
        self, start: int, shape: tuple[int, ...], dtype: np.dtype, device: Sharding
    ) -> None:
        self.start = start
        self.stop = start + shape[0]
        self._device = device
        self._array = jnp.zeros(shape, dtype, device=device)

    def put(self, region: Region, block: HostArray) -> None:
        starts = [at.start if isinstance(at, slice) else at for at in region]
        starts += [0] * (self._array.ndim - len(starts))
        lengths = [1] * sum(isinstance(at, int) for at in region)
        moved = jax.device_put(
            block.astype(self._array.dtype, copy=False).reshape(*lengths, *block.shape),
            self._device,
        )
        self._array = _update(self._array, moved, tuple(np.int32(at) for at in starts))
        # Blocks that wait for their turn would pile up on the device.
        self._array.block_until_ready()

    def take(self) -> jax.Array:
        return self._array


@partial(jax.jit, donate_argnums=0)
def _update(array: jax.Array, block: jax.Array, starts: tuple[np.int32, ...]) -> jax.Array:
    return lax.dynamic_update_slice(array, block, starts)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> HostArray:
    """Return host memory that jax takes over on a CPU, its content undefined."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    offset = -memory.ctypes.data % ALIGNMENT
    return memory[offset : offset + size].view(dtype).reshape(shape)
