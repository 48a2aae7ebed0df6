"""Reads single tensors of safetensors files by byte range.

The format's rules are checked again here (https://github.com/huggingface/safetensors):
the library's own reader maps whole files, and a shard needs only its layers' bytes.
"""

from __future__ import annotations

import itertools
import math
import operator
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, cast

import ml_dtypes
import numpy as np

from pals.errors import CorruptModel, UnsupportedModel
from pals.models.files import (
    MAX_INDEX_BYTES,
    contained_path,
    json_object,
    open_regular,
    parse_json_object,
    read_file,
)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 1 << 18
"""Kimi K2 has about 139,600 in fp8, with their scales."""
MAX_NAME_CHARACTERS = 256
MAX_DIMENSIONS = 8

ITEM_BYTES = MappingProxyType(
    {
        "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
        "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
        "I32": 4, "U32": 4, "F32": 4,
        "I64": 8, "U64": 8, "F64": 8,
    }
)  # fmt: skip

NUMPY_DTYPES = MappingProxyType(
    {
        "F32": np.dtype("<f4"),
        "F16": np.dtype("<f2"),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E8M0": np.dtype(np.uint8),
        "U8": np.dtype(np.uint8),
        "I32": np.dtype("<i4"),
        "I64": np.dtype("<i8"),
    }
)
"""What is read: floats, and the codes and exponents of quantised matrices."""


class Weights(Protocol):
    """The weights of one checkpoint, wherever on this machine they lie."""

    @property
    def folder(self) -> Path:
        """The model's folder, which names it in errors."""
        ...

    @property
    def file_of(self) -> Mapping[str, str]:
        """The name of the weight file of each tensor of the checkpoint, here or not."""
        ...

    def entries(self, names: Iterable[str]) -> dict[str, TensorEntry]:
        """Return where the named tensors stand on this machine.

        Raises:
            CorruptModel: A file is malformed or lacks a tensor that the index puts there.
            ModelNotFound: A tensor was not downloaded.
        """
        ...

    def known_hashes(self, names: Iterable[str]) -> dict[str, str]:
        """Return the SHA-256 in hex of those tensors whose bytes were hashed before."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where one tensor stands: ``size_bytes`` bytes at ``offset`` of the file."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    def part(self, index: int) -> TensorEntry:
        """Return one entry of the first axis."""
        size_bytes = self.size_bytes // self.shape[0]
        return replace(
            self,
            shape=self.shape[1:],
            offset=self.offset + index * size_bytes,
            size_bytes=size_bytes,
        )

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Return entries ``start`` to ``stop`` of the first axis; see `read`."""
        row_bytes = self.size_bytes // self.shape[0]
        rows = replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            offset=self.offset + start * row_bytes,
            size_bytes=(stop - start) * row_bytes,
        )
        return rows.read()

    def read(self) -> np.ndarray:
        """Return the tensor in the dtype of the file.

        Raises:
            UnsupportedModel: The dtype is not one of `NUMPY_DTYPES`.
            CorruptModel: The file became shorter.
        """
        dtype = NUMPY_DTYPES.get(self.dtype)
        if dtype is None:
            raise UnsupportedModel(
                source=self.path, problem=f"weight `{self.name}` has dtype {self.dtype}"
            )
        data = np.empty(self.size_bytes, np.uint8)
        handle = open_regular(self.path)
        try:
            _read_range(handle, data.data, self.offset, self.path)
        finally:
            os.close(handle)
        return data.view(dtype).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The weight files of a model folder: which tensor stands in which file.

    Each header is read once.
    """

    folder: Path
    file_of: MappingProxyType[str, str]
    _headers: dict[str, dict[str, TensorEntry]] = field(
        default_factory=dict[str, "dict[str, TensorEntry]"], repr=False, compare=False
    )

    @classmethod
    def open(cls, folder: Path) -> WeightFiles:
        """Read the index, or the header of the single file.

        Raises:
            CorruptModel: There are no weights, or the index or header is malformed.
        """
        if (folder / INDEX_NAME).is_file():
            return cls(folder, MappingProxyType(read_index(folder)))
        header = read_header(contained_path(folder, SINGLE_NAME))
        file_of = MappingProxyType(dict.fromkeys(header, SINGLE_NAME))
        return cls(folder, file_of, {SINGLE_NAME: header})

    def entries(self, names: Iterable[str]) -> dict[str, TensorEntry]:
        """Return where the named tensors stand; reads the headers of their files only.

        Raises:
            CorruptModel: A file is missing or malformed, or lacks a tensor of the index.
        """
        wanted = set(names)
        found: dict[str, TensorEntry] = {}
        for file_name in sorted({self.file_of[name] for name in wanted}):
            header = self._header(file_name)
            found |= {name: header[name] for name in wanted & header.keys()}
        return found

    def _header(self, file_name: str) -> dict[str, TensorEntry]:
        if file_name not in self._headers:
            path = contained_path(self.folder, file_name)
            header = read_header(path)
            check_index(self.file_of, header, file_name, path)
            self._headers[file_name] = header
        return self._headers[file_name]

    def known_hashes(self, names: Iterable[str]) -> dict[str, str]:
        """Return no hashes: a plain folder keeps none of single tensors."""
        del names
        return {}


def read_index(folder: Path) -> dict[str, str]:
    """Return the file name of each tensor of a sharded checkpoint.

    Raises:
        CorruptModel: The index is malformed, or names a file outside the folder.
    """
    path = folder / INDEX_NAME
    index = parse_json_object(read_file(folder, INDEX_NAME, most=MAX_INDEX_BYTES), path)
    weight_map = json_object(index.get("weight_map"), path)
    if len(weight_map) > MAX_TENSORS:
        raise CorruptModel(source=path, problem=f"it names {len(weight_map)} tensors")
    file_of = {name: _weight_file_name(value, path) for name, value in weight_map.items()}
    _check_names(file_of, path)
    for file_name in set(file_of.values()):
        contained_path(folder, file_name)
    return file_of


def _weight_file_name(value: object, source: Path) -> str:
    if not isinstance(value, str):
        raise CorruptModel(source=source, problem="a tensor stands in something else than a file")
    if not value.endswith(".safetensors"):
        raise CorruptModel(source=source, problem=f"{value[:200]!r} is no safetensors file")
    return value


def _check_names(names: Iterable[str], source: Path) -> None:
    """Raise `CorruptModel` on a tensor's name that could not be shown in one line."""
    for name in names:
        if len(name) > MAX_NAME_CHARACTERS or not name.isprintable():
            problem = f"{name[:MAX_NAME_CHARACTERS]!r} is no name of a tensor"
            raise CorruptModel(source=source, problem=problem)


def check_index(
    file_of: Mapping[str, str], header: Collection[str], file_name: str, source: Path
) -> None:
    """Raise `CorruptModel` unless a file holds what the index puts there, and nothing else."""
    listed = {name for name, file in file_of.items() if file == file_name}
    lacking, unlisted = sorted(listed - set(header)), sorted(set(header) - listed)
    if lacking:
        raise CorruptModel(source=source, problem=f"the index puts {', '.join(lacking[:4])} here")
    if unlisted:
        problem = f"the index does not put {', '.join(unlisted[:4])} here"
        raise CorruptModel(source=source, problem=problem)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of one file, having checked that they tile its data.

    Raises:
        CorruptModel: The header is too large or malformed, sizes and shapes disagree, or
            tensors overlap, leave gaps or end elsewhere than the file does.
    """
    handle = open_regular(path)
    try:
        file_bytes = os.fstat(handle).st_size
        prefix = bytearray(8)
        _read_range(handle, memoryview(prefix), 0, path)
        header_bytes = check_header_size(bytes(prefix), path, file_bytes)
        header = bytearray(header_bytes)
        _read_range(handle, memoryview(header), 8, path)
    finally:
        os.close(handle)
    return parse_header(bytes(header), path, file_bytes)


def check_header_size(prefix: bytes, source: Path, file_bytes: int) -> int:
    """Return the size of the JSON header that the first 8 bytes of a file claim.

    Raises:
        CorruptModel: It is too large for the file, or for any honest header.
    """
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
        raise CorruptModel(source=source, problem=f"its header claims {header_bytes} bytes")
    return header_bytes


def parse_header(header: bytes, path: Path, file_bytes: int) -> dict[str, TensorEntry]:
    """Return the tensors that the JSON header of a file of ``file_bytes`` bytes names.

    Raises:
        CorruptModel: As `read_header`.
        UnsupportedModel: A tensor has a dtype that the format does not have.
    """
    if not header.startswith(b"{"):
        raise CorruptModel(source=path, problem="its header does not begin with a JSON object")
    values = parse_json_object(header, path)
    values.pop("__metadata__", None)
    if len(values) > MAX_TENSORS:
        raise CorruptModel(source=path, problem=f"it holds {len(values)} tensors")
    _check_names(values, path)
    start = 8 + len(header)
    entries = [_parse_entry(name, value, path, start) for name, value in values.items()]
    _check_tiling(entries, path, start, file_bytes)
    return {entry.name: entry for entry in entries}


def _parse_entry(name: str, value: object, path: Path, start: int) -> TensorEntry:
    entry = json_object(value, path)
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise UnsupportedModel(source=path, problem=f"weight `{name}` has dtype {dtype!r:.40}")
    shape = _integers(entry.get("shape"), MAX_DIMENSIONS)
    offsets = _integers(entry.get("data_offsets"), 2)
    if shape is None or offsets is None or len(offsets) != 2:
        raise CorruptModel(source=path, problem=f"weight `{name}` has no shape or no offsets")
    size_bytes = offsets[1] - offsets[0]
    counts = itertools.accumulate(shape, operator.mul)
    # The library multiplies in 64 bits, and refuses what passes them before it comes to a 0.
    if max(counts, default=0) >= 1 << 64 or math.prod(shape) * ITEM_BYTES[dtype] != size_bytes:
        raise CorruptModel(
            source=path,
            problem=f"weight `{name}` of {dtype} {list(shape)} takes {size_bytes} bytes",
        )
    return TensorEntry(
        name=name,
        path=path,
        dtype=dtype,
        shape=shape,
        offset=start + offsets[0],
        size_bytes=size_bytes,
    )


def _integers(value: object, most: int) -> tuple[int, ...] | None:
    """Return a JSON list of at most ``most`` sane sizes, or None."""
    items = cast("list[object]", value) if isinstance(value, list) else None
    if items is None or len(items) > most:
        return None
    numbers = tuple(item for item in items if type(item) is int and 0 <= item < 1 << 48)
    return numbers if len(numbers) == len(items) else None


def _check_tiling(entries: list[TensorEntry], path: Path, start: int, file_bytes: int) -> None:
    end = start
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.size_bytes)):
        if entry.offset != end:
            raise CorruptModel(
                source=path, problem=f"weight `{entry.name}` overlaps another or leaves a gap"
            )
        end += entry.size_bytes
    if end != file_bytes:
        raise CorruptModel(
            source=path, problem=f"its tensors end at byte {end}, the file at {file_bytes}"
        )


def _read_range(handle: int, target: memoryview, offset: int, path: Path) -> None:
    """Fill ``target`` from ``offset`` on; one read may return less than asked for."""
    done = 0
    while done < len(target):
        count = os.preadv(handle, [target[done:]], offset + done)
        if count == 0:
            raise CorruptModel(source=path, problem=f"it ends at byte {offset + done}, too early")
        done += count
