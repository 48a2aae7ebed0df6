"""Read the header of a GGUF file without trusting a byte of it.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package
has a reader, but it maps what the header claims before checking it, so that a damaged
file ends in a numpy error or in gigabytes; here every count is held against the file.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from pals.errors import CorruptModel

MAX_HEADER_BYTES = 64 << 20
MAX_METADATA_KEYS = 4096
MAX_TENSORS = 1 << 16
MAX_STRINGS = 1 << 21
MAX_NAME_BYTES = 1 << 16
MAX_DIMENSIONS = 4
MAX_ELEMENTS = 1 << 40
MAX_ALIGNMENT = 1 << 16
DEFAULT_ALIGNMENT = 32
VERSIONS = (2, 3)

_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]

MetadataValue = bool | int | float | str | list[str] | NDArray[np.generic]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """Where one tensor lies in its file.

    Attributes:
        shape: Row-major, ``(out, in)`` for a matrix: the reverse of the file's order.
        kind: Storage type; quantisation blocks lie along the last axis.
        offset: First byte, from the start of the file.
        size_bytes: Length in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """The checked header of one file; accessors raise `CorruptModel` on a wrong type."""

    source: Path
    metadata: Mapping[str, MetadataValue]
    tensors: Mapping[str, GgufTensor]

    def integer(self, key: str, *, maximum: int, default: int | None = None) -> int:
        """Return an integer in ``[0, maximum]``; ``default=None`` makes it required."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= maximum:
            raise self._wrong(key, f"an integer from 0 to {maximum}")
        return value

    def positive(self, key: str, *, maximum: int, default: int | None = None) -> int:
        """Return an integer in ``[1, maximum]``."""
        value = self.integer(key, maximum=maximum, default=default)
        if value == 0:
            raise self._wrong(key, "an integer above 0")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        """Return a finite positive number."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number")
        if not (math.isfinite(value) and value > 0):
            raise self._wrong(key, "a finite number above 0")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def text(self, key: str, *, default: str | None = None) -> str:
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def strings(self, key: str) -> list[str]:
        value = self.metadata.get(key)
        if not isinstance(value, list):
            raise self._wrong(key, "a list of strings")
        return value

    def integers(self, key: str) -> NDArray[np.integer]:
        value = self.metadata.get(key)
        if not isinstance(value, np.ndarray) or not np.issubdtype(value.dtype, np.integer):
            raise self._wrong(key, "a list of integers")
        return value.astype(np.int64)

    def _wrong(self, key: str, wanted: str) -> CorruptModel:
        value = self.metadata.get(key, "missing")
        shown = value if isinstance(value, bool | int | float) else type(value).__name__
        shown = "missing" if key not in self.metadata else shown
        return CorruptModel(source=self.source, problem=f"`{key}` is {shown}, not {wanted}")


def read_header(file: Path) -> GgufHeader:
    """Read and check the header of ``file``; reads at most 64 MiB of it.

    Raises:
        CorruptModel: It is not a little-endian GGUF file of version 2 or 3, or a count,
            type, shape or offset in it cannot be true.
    """
    try:
        with file.open("rb") as handle:
            size = handle.seek(0, 2)
            handle.seek(0)
            cursor = _Cursor(file, handle.read(min(size, MAX_HEADER_BYTES)))
    except OSError as error:
        raise CorruptModel(source=file, problem=f"cannot be read: {error.strerror}") from error
    num_tensors, num_keys = _read_preamble(cursor)
    metadata = _read_metadata(cursor, num_keys)
    infos = [_read_tensor_info(cursor) for _ in range(num_tensors)]
    start = _data_start(cursor, metadata)
    tensors = _place_tensors(cursor, infos, start, size)
    return GgufHeader(source=file, metadata=metadata, tensors=tensors)


class _Cursor:
    """A bounded reader of little-endian values over the first bytes of a file."""

    __slots__ = ("_data", "_source", "_strings_left", "at")

    def __init__(self, source: Path, data: bytes) -> None:
        self._source = source
        self._data = data
        self._strings_left = MAX_STRINGS
        self.at = 0

    def corrupt(self, problem: str) -> CorruptModel:
        return CorruptModel(source=self._source, problem=problem)

    def take(self, size: int) -> bytes:
        """Return the next ``size`` bytes."""
        if size > len(self._data) - self.at:
            raise self.corrupt(
                f"{size} bytes are claimed at byte {self.at} of a header that has {len(self._data)}"
            )
        self.at += size
        return self._data[self.at - size : self.at]

    def scalar(self, code: str) -> int | float | bool:
        form = struct.Struct("<" + code)
        return form.unpack(self.take(form.size))[0]

    def integer(self, code: str) -> int:
        return int(self.scalar(code))

    def string(self) -> str:
        self._strings_left -= 1
        if self._strings_left < 0:
            raise self.corrupt(f"more than {MAX_STRINGS} strings in the header")
        raw = self.take(self.integer("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.corrupt(f"a string before byte {self.at} is not UTF-8") from error

    def name(self) -> str:
        text = self.string()
        if not 0 < len(text) <= MAX_NAME_BYTES:
            raise self.corrupt(f"a name of {len(text)} characters before byte {self.at}")
        return text

    def value(self) -> MetadataValue:
        kind = self.integer("I")
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise self.corrupt(f"metadata type {kind} before byte {self.at} is unknown")
        return self.scalar(_SCALARS[kind])

    def array(self) -> list[str] | NDArray[np.generic]:
        """Read an array of strings or scalars; arrays in arrays have no use in models."""
        kind, count = self.integer("I"), self.integer("Q")
        if kind == _STRING:
            # a string takes 8 bytes or more, so a lie about the count ends the loop early
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise self.corrupt(f"array of type {kind} before byte {self.at} is unknown")
        dtype = np.dtype("<" + _SCALARS[kind]) if kind != 7 else np.dtype(np.bool_)
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    if cursor.take(4) != b"GGUF":
        raise cursor.corrupt("does not start with `GGUF`")
    raw = cursor.take(4)
    version = int.from_bytes(raw, "little")
    if int.from_bytes(raw, "big") in (1, *VERSIONS):
        raise cursor.corrupt("is a big-endian GGUF file; only little-endian ones are read")
    if version not in VERSIONS:
        raise cursor.corrupt(f"GGUF version {version} is not one of {VERSIONS}")
    num_tensors, num_keys = cursor.integer("Q"), cursor.integer("Q")
    if num_tensors > MAX_TENSORS or num_keys > MAX_METADATA_KEYS:
        raise cursor.corrupt(f"claims {num_tensors} tensors and {num_keys} metadata keys")
    return num_tensors, num_keys


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, MetadataValue]:
    metadata: dict[str, MetadataValue] = {}
    for _ in range(count):
        key = cursor.name()
        if key in metadata:
            raise cursor.corrupt(f"metadata key `{key}` appears twice")
        metadata[key] = cursor.value()
    return metadata


def _read_tensor_info(cursor: _Cursor) -> GgufTensor:
    """Read one tensor's row; its offset still counts from the start of the data."""
    name = cursor.name()
    dimensions = cursor.integer("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise cursor.corrupt(f"tensor `{name}` has {dimensions} dimensions")
    shape = tuple(reversed([cursor.integer("Q") for _ in range(dimensions)]))
    elements = math.prod(shape)
    if not 0 < elements <= MAX_ELEMENTS:
        raise cursor.corrupt(f"tensor `{name}` has the shape {shape}")
    raw_kind = cursor.integer("I")
    try:
        kind = GGMLQuantizationType(raw_kind)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise cursor.corrupt(f"tensor `{name}` has the unknown type {raw_kind}") from None
    if shape[-1] % block:
        raise cursor.corrupt(f"tensor `{name}` {shape} does not divide into blocks of {block}")
    return GgufTensor(
        name=name,
        shape=shape,
        kind=kind,
        offset=cursor.integer("Q"),
        size_bytes=elements // block * block_bytes,
    )


def _data_start(cursor: _Cursor, metadata: Mapping[str, MetadataValue]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if (
        isinstance(alignment, bool)
        or not isinstance(alignment, int)
        or not 8 <= alignment <= MAX_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        raise cursor.corrupt("`general.alignment` is not a power of two from 8 to 65536")
    return -(-cursor.at // alignment) * alignment


def _place_tensors(
    cursor: _Cursor, infos: list[GgufTensor], start: int, file_size: int
) -> dict[str, GgufTensor]:
    """Make offsets absolute and check that the tensors lie in the file, side by side."""
    placed = [
        GgufTensor(
            name=t.name,
            shape=t.shape,
            kind=t.kind,
            offset=start + t.offset,
            size_bytes=t.size_bytes,
        )
        for t in sorted(infos, key=lambda t: t.offset)
    ]
    for tensor in placed:
        end = tensor.offset + tensor.size_bytes
        if end > file_size:
            raise cursor.corrupt(f"tensor `{tensor.name}` ends at byte {end} of {file_size}")
    for before, after in pairwise(placed):
        if before.offset + before.size_bytes > after.offset:
            raise cursor.corrupt(f"tensors `{before.name}` and `{after.name}` overlap")
    if len({t.name for t in placed}) != len(placed):
        raise cursor.corrupt("two tensors have the same name")
    return {t.name: t for t in placed}
