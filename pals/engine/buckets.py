"""Which steps are compiled, and which of them runs a batch.

A step has rows of one token, or of a few tokens to verify, and at most one chunk of a
prompt. Each is padded to the next size that there is a program for. Everything that the
limits allow fits some program, at least row by row, so that nothing is compiled later.

Pure: no clock, no jax.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from pals.errors import InvalidConfig
from pals.types import EngineLimits

MAX_PROGRAMS = 32

SMALLEST_ROWS = (1, 2, 4)
"""On some processors one row takes two thirds of the time of two, and two of that of four."""

CHEAP_ROWS = 8
"""Up to as many rows a step takes about as long as with a few: it reads the same weights."""

SMALLEST_CHUNK = 16

_ROW_RATIOS = (2, 4, 8, 64)
"""Most between neighbouring sizes of rows: the first that gives few enough programs is taken.
Rows are padded to at most twice as many where that is affordable."""

_CHUNK_RATIO = 8
_SMALL_RATIO = 32
"""Smaller chunks as parts of the largest. A small one alone costs a reading of all weights, but
ends within a gap between rows; beside decode rows it costs arithmetic only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """What the steps of a shard are compiled for.

    Attributes:
        max_rows: Rows of one step, beside a chunk.
        max_context_tokens: Tokens that one session may reach.
        max_chunk_tokens: Tokens of a prompt that one step computes; a power of two.
        verify_tokens: Tokens of a row that verifies a draft; 1 where nothing is drafted.
        page_tokens: Tokens of a page.
    """

    max_rows: int = 64
    max_context_tokens: int = 131072
    max_chunk_tokens: int = 512
    verify_tokens: int = 8
    page_tokens: int = 64

    @classmethod
    def of(cls, limits: EngineLimits) -> BatchLimits:
        """Return what a shard with these limits compiles."""
        return cls(
            max_rows=limits.max_rows,
            max_context_tokens=limits.max_context_tokens,
            max_chunk_tokens=limits.max_chunk_tokens,
            verify_tokens=limits.verify_tokens,
            page_tokens=limits.page_tokens,
        )

    @property
    def max_pages(self) -> int:
        """Pages of the longest session."""
        return self.pages_of(self.max_context_tokens)

    def pages_of(self, tokens: int) -> int:
        """Return how many pages hold ``tokens``."""
        return -(-tokens // self.page_tokens)


def check_batch_limits(limits: BatchLimits) -> None:
    """Raise unless steps can be compiled for ``limits``.

    Raises:
        InvalidConfig: They cannot.
    """
    chunk = limits.max_chunk_tokens
    checks = (
        ("max_rows", limits.max_rows, 1 <= limits.max_rows <= 256, "1 to 256"),
        ("max_context_tokens", limits.max_context_tokens,
         1 <= limits.max_context_tokens <= 1 << 20, f"1 to {1 << 20}"),
        ("max_chunk_tokens", chunk,
         SMALLEST_CHUNK <= chunk <= 512 and chunk & (chunk - 1) == 0,
         f"a power of two from {SMALLEST_CHUNK} to 512"),
        ("verify_tokens", limits.verify_tokens, 1 <= limits.verify_tokens <= 32, "1 to 32"),
        ("page_tokens", limits.page_tokens, limits.page_tokens in (16, 32, 64), "16, 32 or 64"),
    )  # fmt: skip
    for name, value, holds, choices in checks:
        if not holds:
            problem, advice = f"{name} is {value}", f"choose {choices}"
            raise InvalidConfig(source="shard", problem=problem, advice=advice)


@dataclass(frozen=True, slots=True, order=True)
class Program:
    """The padded sizes of one compiled step.

    Attributes:
        rows: Of short rows; 0 where the step has a chunk alone.
        row_tokens: Tokens of each short row.
        chunk_tokens: Of the chunk; 0 where the step has none.
        pages: Width of the page tables, which attention may read.
    """

    rows: int
    row_tokens: int
    chunk_tokens: int
    pages: int

    @property
    def tokens(self) -> int:
        """All tokens of a step, padding included."""
        return self.rows * self.row_tokens + self.chunk_tokens

    @property
    def kind(self) -> Literal["decode", "verify", "chunk", "mixed"]:
        if self.chunk_tokens:
            return "mixed" if self.rows else "chunk"
        return "verify" if self.row_tokens > 1 else "decode"

    def __str__(self) -> str:
        short = f"{self.rows}x{self.row_tokens}" if self.rows else ""
        chunk = f"c{self.chunk_tokens}" if self.chunk_tokens else ""
        return f"{self.kind}_{short}{chunk}_p{self.pages}"


def plan_programs(limits: BatchLimits) -> tuple[Program, ...]:
    """Return the programs of a shard, at most `MAX_PROGRAMS`.

    Raises:
        InvalidConfig: The limits are no limits of a shard.
    """
    check_batch_limits(limits)
    for ratio in _ROW_RATIOS:
        programs = tuple(sorted(set(_programs(limits, ratio))))
        if len(programs) <= MAX_PROGRAMS:
            return programs
    raise AssertionError(f"{limits} need more programs than there may be")


def usual_chunk(limits: BatchLimits) -> int:
    """Return the tokens of a chunk that is long enough for the weights that it reads."""
    return max(SMALLEST_CHUNK, limits.max_chunk_tokens // _CHUNK_RATIO)


def _programs(limits: BatchLimits, row_ratio: int) -> Iterator[Program]:
    rows = _row_sizes(limits.max_rows, row_ratio)
    largest, pages = limits.max_chunk_tokens, limits.max_pages
    usual, small = usual_chunk(limits), max(SMALLEST_CHUNK, largest // _SMALL_RATIO)
    few, middle = (min(size, rows[-1]) for size in (SMALLEST_ROWS[-1], CHEAP_ROWS))
    yield from (Program(count, 1, 0, pages) for count in rows)
    if limits.verify_tokens > 1:
        verify = limits.verify_tokens
        yield from (Program(count, verify, 0, pages) for count in (few, middle))
    yield from (Program(0, 1, chunk, pages) for chunk in (small, usual, largest))
    for count in (middle, rows[-1]):
        yield from (Program(count, 1, chunk, pages) for chunk in (small, usual))


def _row_sizes(most: int, ratio: int) -> list[int]:
    """Return 1, 2, 4, 8 and multiples of it, up to what holds ``most``."""
    smallest = [size for size in SMALLEST_ROWS if size < most]
    return [*smallest, *_sizes(min(CHEAP_ROWS, most), most, ratio)]


def _sizes(least: int, most: int, ratio: int) -> list[int]:
    """Return sizes from ``least`` to ``most``, each at most about ``ratio`` times the last."""
    steps = math.ceil(math.log(most / least, ratio) - 1e-9)
    sizes = {math.ceil(least * (most / least) ** (step / steps) - 1e-9) for step in range(steps)}
    return sorted({*sizes, most})


class Buckets:
    """The programs of one shard, and the smallest of them for each batch.

    Attributes:
        limits: What they are compiled for.
        programs: All of them.
        chunk_sizes: Of chunks, alone or beside rows, smallest first.
    """

    def __init__(self, limits: BatchLimits) -> None:
        """Plan the programs.

        Raises:
            InvalidConfig: The limits are no limits of a shard.
        """
        self.limits = limits
        self.programs = plan_programs(limits)
        self.chunk_sizes = sorted({p.chunk_tokens for p in self.programs if p.chunk_tokens})
        self._choose = lru_cache(maxsize=4096)(self._search)

    def choose(self, rows: int, row_tokens: int, chunk_tokens: int, pages: int) -> Program | None:
        """Return the program that pads a batch least; None when none holds it."""
        return self._choose(rows, row_tokens, chunk_tokens, pages)

    def _search(self, rows: int, row_tokens: int, chunk: int, pages: int) -> Program | None:
        holding = (
            p
            for p in self.programs
            if p.rows >= rows and p.row_tokens >= row_tokens and p.pages >= pages
            and p.chunk_tokens >= chunk
            and bool(p.rows) == bool(rows) and bool(p.chunk_tokens) == bool(chunk)
        )  # fmt: skip
        return min(holding, key=lambda p: (p.tokens, p.rows * p.pages, p), default=None)
