"""Weights of a checkpoint in each of the formats, decoded by blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from pals.errors import CorruptModel, UnsupportedModel
from pals.models import packed
from pals.models.config import QuantizationConfig

Array = npt.NDArray[np.generic]
Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]
Shape = tuple[int, ...]

PLAIN_DTYPES = frozenset({"F32", "F16", "BF16"})
EXPONENT_DTYPES = frozenset({"U8", "F8_E8M0"})

_WIDE_BYTES = 4


class StoredTensor(Protocol):
    """A tensor of a checkpoint file, as `pals.models.safetensors.TensorEntry` is."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Shape: ...
    def part(self, index: int) -> StoredTensor:
        """Return one entry of the first axis."""
        ...

    def read_rows(self, start: int, stop: int) -> Array:
        """Return entries of the first axis; E8M0 as uint8."""
        ...

    def read(self) -> Array:
        """Return all of it; E8M0 as uint8."""
        ...


class StoredWeight(Protocol):
    """One logical weight."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def shape(self) -> Shape: ...
    def blocks(self, most_bytes: int) -> Iterator[tuple[slice, Array]]:
        """Yield all rows of the first axis in order, in float32, float16 or bf16.

        A block takes at most ``most_bytes`` in float32, or is one row. Numbers that are
        not finite are passed on.
        """
        ...


@dataclass(frozen=True, slots=True)
class PlainWeight:
    """A tensor of floats."""

    tensor: StoredTensor

    @classmethod
    def of(cls, name: str, parts: Mapping[str, StoredTensor]) -> PlainWeight:
        tensor = parts["weight"]
        if tensor.dtype not in PLAIN_DTYPES:
            raise UnsupportedModel(
                source=tensor.path, problem=f"weight `{name}` has dtype {tensor.dtype}"
            )
        return cls(tensor)

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def path(self) -> Path:
        return self.tensor.path

    @property
    def shape(self) -> Shape:
        return self.tensor.shape

    def part(self, index: int) -> PlainWeight:
        """Return one entry of the first axis."""
        return PlainWeight(self.tensor.part(index))

    def blocks(self, most_bytes: int) -> Iterator[tuple[slice, Array]]:
        for rows in row_blocks(self.shape, most_bytes):
            yield rows, self.tensor.read_rows(rows.start, rows.stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Weight:
    """A matrix in E4M3 with a scale for each block of rows and columns."""

    name: str
    weight: StoredTensor
    scales: StoredTensor
    block_size: tuple[int, int]

    @classmethod
    def of(
        cls, name: str, parts: Mapping[str, StoredTensor], config: QuantizationConfig
    ) -> Fp8Weight:
        weight = parts["weight"]
        scales = parts.get("weight_scale_inv") or parts["weight_scale"]
        check_dtype(weight, "F8_E4M3")
        check_dtype(scales, *PLAIN_DTYPES, *EXPONENT_DTYPES)
        check_axes(weight, 2)
        # one scale for the whole matrix is one block of its size
        block_size = config.block_size or cast("tuple[int, int]", weight.shape)
        wanted = tuple(-(-n // max(1, b)) for n, b in zip(weight.shape, block_size, strict=True))
        if config.block_size is not None or scales.shape not in ((), (1,)):
            check_shape(scales, wanted)
        return cls(name=name, weight=weight, scales=scales, block_size=block_size)

    @property
    def path(self) -> Path:
        return self.weight.path

    @property
    def shape(self) -> Shape:
        return self.weight.shape

    def blocks(self, most_bytes: int) -> Iterator[tuple[slice, Array]]:
        stored = self.scales.read()
        if self.scales.dtype in EXPONENT_DTYPES:
            stored = packed.exponents_to_scales(cast("UInt8", stored))
        rows_of_blocks = -(-self.shape[0] // self.block_size[0])
        scales = stored.astype(np.float32).reshape(rows_of_blocks, -1)
        for rows in row_blocks(self.shape, most_bytes):
            values = self.weight.read_rows(rows.start, rows.stop)
            yield rows, packed.scale_blocks(values, scales, rows.start, self.block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4Weight:
    """Matrices of experts [E, out, in] in E2M1, 32 of which share an exponent.

    transformers holds them transposed, as [E, in, out]; the layout of the file is
    already that of all other matrices here.
    """

    name: str
    elements: StoredTensor
    exponents: StoredTensor
    shape: Shape

    @classmethod
    def of(
        cls, name: str, parts: Mapping[str, StoredTensor], config: QuantizationConfig
    ) -> Mxfp4Weight:
        del config
        elements, exponents = parts["blocks"], parts["scales"]
        check_dtype(elements, "U8")
        check_dtype(exponents, *EXPONENT_DTYPES)
        check_axes(elements, 4)
        check_shape(elements, (*elements.shape[:3], 16))
        check_shape(exponents, elements.shape[:3])
        shape = (*elements.shape[:2], elements.shape[2] * 32)
        return cls(name=name, elements=elements, exponents=exponents, shape=shape)

    @property
    def path(self) -> Path:
        return self.elements.path

    def part(self, index: int) -> Mxfp4Weight:
        """Return the matrix of one expert."""
        return replace(
            self,
            elements=self.elements.part(index),
            exponents=self.exponents.part(index),
            shape=self.shape[1:],
        )

    def blocks(self, most_bytes: int) -> Iterator[tuple[slice, Array]]:
        for rows in row_blocks(self.shape, most_bytes):
            elements = self.elements.read_rows(rows.start, rows.stop)
            exponents = self.exponents.read_rows(rows.start, rows.stop)
            values = packed.decode_mxfp4(cast("UInt8", elements), cast("UInt8", exponents))
            yield rows, values


StackedWeight = PlainWeight | Mxfp4Weight
"""A weight that may have three axes; the other formats keep each matrix by itself."""


def row_blocks(shape: Shape, most_bytes: int, *, multiple: int = 1) -> Iterator[slice]:
    """Yield slices that cover the first axis, of a multiple of ``multiple`` rows each."""
    row_bytes = _WIDE_BYTES * math.prod(shape[1:])
    step = max(1, most_bytes // max(1, row_bytes) // multiple) * multiple
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def check_dtype(tensor: StoredTensor, *wanted: str) -> None:
    """Raise `CorruptModel` unless a tensor has one of these dtypes."""
    if tensor.dtype not in wanted:
        raise CorruptModel(
            source=tensor.path,
            problem=f"`{tensor.name}` has dtype {tensor.dtype} instead of "
            + " or ".join(sorted(wanted)),
        )


def check_shape(tensor: StoredTensor, wanted: Shape) -> None:
    """Raise `CorruptModel` unless a tensor has this shape."""
    if tensor.shape != wanted:
        raise CorruptModel(
            source=tensor.path,
            problem=f"`{tensor.name}` has shape {list(tensor.shape)} instead of {list(wanted)}",
        )


def check_axes(tensor: StoredTensor, count: int) -> None:
    """Raise `CorruptModel` unless a tensor has so many axes."""
    if len(tensor.shape) != count:
        raise CorruptModel(
            source=tensor.path,
            problem=f"`{tensor.name}` has {len(tensor.shape)} axes instead of {count}",
        )
