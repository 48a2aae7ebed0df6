"""Matrices of AWQ and GPTQ checkpoints: codes of four or eight bits in 32-bit words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from pals.errors import CorruptModel
from pals.models import packed
from pals.models.config import QuantizationConfig
from pals.models.stored import (
    PLAIN_DTYPES,
    Array,
    Float32,
    Shape,
    StoredTensor,
    UInt8,
    check_axes,
    check_dtype,
    check_shape,
    row_blocks,
)


class Int4Rows(NamedTuple):
    """Rows of a matrix that the checkpoint itself keeps in 4 bits.

    Attributes:
        codes: [R, in].
        scales: [R, G], of groups of the checkpoint's size.
        zeros: [R, G] in [0, 16]; a row's value is ``(code - zero) * scale``.
    """

    codes: UInt8
    scales: Float32
    zeros: npt.NDArray[np.int16]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A matrix of codes in 32-bit words, stored ``(in, out)``, with a grid for each group.

    Attributes:
        bits: Of a code.
        group_size: Columns that share a scale.
        zero_offset: Added to stored zero points.
        shape: [out, in].
        groups: [in], the group of each column, or None where they are in order.
    """

    name: str
    qweight: StoredTensor
    qzeros: StoredTensor
    scales: StoredTensor
    groups: StoredTensor | None
    bits: int
    group_size: int
    zero_offset: int
    shape: Shape

    @property
    def path(self) -> Path:
        return self.qweight.path

    def is_int4(self, group_size: int) -> bool:
        """Return whether `int4_blocks` works for groups of this size."""
        return self.bits == 4 and self.group_size == group_size and self._is_ordered()

    def blocks(self, most_bytes: int) -> Iterator[tuple[slice, Array]]:
        group_of = self._group_of()
        for rows, (codes, scales, zeros) in self._rows(most_bytes):
            values = (codes - zeros[:, group_of]).astype(np.float32)
            with np.errstate(over="ignore", invalid="ignore"):  # the caller refuses these
                values *= scales[:, group_of]
            yield rows, values

    def int4_blocks(self, most_bytes: int, group_size: int) -> Iterator[tuple[slice, Int4Rows]]:
        """Yield all rows as the checkpoint's own 4-bit codes.

        Raises:
            ValueError: `is_int4` is false.
        """
        if not self.is_int4(group_size):
            raise ValueError(f"{self.name} is not kept in 4 bits by groups of {group_size}")
        yield from self._rows(most_bytes)

    def _rows(self, most_bytes: int) -> Iterator[tuple[slice, Int4Rows]]:
        """Yield blocks of rows; the words are held whole, since rows are their columns."""
        words = cast("packed.Int32", self.qweight.read())
        zeros = self._unpack_columns(cast("packed.Int32", self.qzeros.read()))
        zeros += self.zero_offset
        scales = self.scales.read().astype(np.float32)
        for rows in row_blocks(self.shape, most_bytes, multiple=packed.WORD_BITS // self.bits):
            codes = self._unpack_block(words, rows).astype(np.uint8)
            yield rows, Int4Rows(codes.T, scales[:, rows].T, zeros[:, rows].T)

    def _unpack_columns(self, words: packed.Int32) -> npt.NDArray[np.int16]:
        return packed.unpack_columns(words, self.bits)

    def _unpack_block(self, words: packed.Int32, rows: slice) -> npt.NDArray[np.int16]:
        """Return codes [in, R]."""
        return packed.unpack_rows(words[:, rows], self.bits)

    def _group_of(self) -> npt.NDArray[np.int64]:
        in_order = np.arange(self.shape[1]) // self.group_size
        if self.groups is None:
            return in_order
        group_of = self.groups.read().astype(np.int64)
        if group_of.size and not 0 <= group_of.min() <= group_of.max() < self.scales.shape[0]:
            raise CorruptModel(
                source=self.path,
                problem=f"`{self.groups.name}` names groups that are not there",
            )
        return group_of

    def _is_ordered(self) -> bool:
        in_order = np.arange(self.shape[1]) // self.group_size
        return self.groups is None or np.array_equal(self._group_of(), in_order)


class GptqWeight(PackedWeight):
    """GPTQ: words run along ``in``; with act-order, columns name their group."""

    __slots__ = ()

    @classmethod
    def of(
        cls, name: str, parts: Mapping[str, StoredTensor], config: QuantizationConfig
    ) -> GptqWeight:
        qweight, scales, groups = parts["qweight"], parts["scales"], parts.get("g_idx")
        codes_per_word = packed.WORD_BITS // config.bits
        check_dtype(qweight, "I32")
        check_axes(qweight, 2)
        in_size, out_size = qweight.shape[0] * codes_per_word, qweight.shape[1]
        group_size = config.group_size or max(1, in_size)
        num_groups = -(-in_size // group_size)
        _check_grid(parts, num_groups, out_size, codes_per_word)
        if groups is not None:
            check_dtype(groups, "I32", "I64")
            check_shape(groups, (in_size,))
        return cls(
            name=name,
            qweight=qweight,
            qzeros=parts["qzeros"],
            scales=scales,
            groups=groups,
            bits=config.bits,
            group_size=group_size,
            zero_offset=config.zero_offset,
            shape=(out_size, in_size),
        )


class AwqWeight(PackedWeight):
    """AWQ: words run along ``out``, in an order of their own."""

    __slots__ = ()

    @classmethod
    def of(
        cls, name: str, parts: Mapping[str, StoredTensor], config: QuantizationConfig
    ) -> AwqWeight:
        qweight = parts["qweight"]
        codes_per_word = packed.WORD_BITS // config.bits
        check_dtype(qweight, "I32")
        check_axes(qweight, 2)
        in_size, out_size = qweight.shape[0], qweight.shape[1] * codes_per_word
        group_size = config.group_size or max(1, in_size)
        _check_grid(parts, -(-in_size // group_size), out_size, codes_per_word)
        return cls(
            name=name,
            qweight=qweight,
            qzeros=parts["qzeros"],
            scales=parts["scales"],
            groups=None,
            bits=config.bits,
            group_size=group_size,
            zero_offset=0,
            shape=(out_size, in_size),
        )

    def _unpack_columns(self, words: packed.Int32) -> npt.NDArray[np.int16]:
        return packed.unpack_awq(words)

    def _unpack_block(self, words: packed.Int32, rows: slice) -> npt.NDArray[np.int16]:
        width = packed.WORD_BITS // self.bits
        return packed.unpack_awq(words[:, rows.start // width : rows.stop // width])


def _check_grid(
    parts: Mapping[str, StoredTensor], num_groups: int, out_size: int, codes_per_word: int
) -> None:
    check_dtype(parts["qzeros"], "I32")
    check_dtype(parts["scales"], *PLAIN_DTYPES)
    check_shape(parts["qzeros"], (num_groups, -(-out_size // codes_per_word)))
    check_shape(parts["scales"], (num_groups, out_size))
