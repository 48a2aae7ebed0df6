"""The arrays of one step, put together on the host.

Each program has arrays of its own, which its steps use one after another: what a step does
not overwrite is padding, whose content nothing reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pals.engine.batch import Step, StepRow
from pals.engine.buckets import Program
from pals.models.paged import Tables

Array = npt.NDArray[np.generic]
Int32 = npt.NDArray[np.int32]


class StepArrays:
    """The inputs of one program.

    Args:
        program: Its sizes.
        empty: One token of inputs, of which a buffer is made.
    """

    def __init__(self, program: Program, empty: Array) -> None:
        batch = program.rows + bool(program.chunk_tokens)
        self._program = program
        self._short_tokens = program.rows * program.row_tokens
        self.inputs: Array = np.zeros((program.tokens, *empty.shape), empty.dtype)
        self._starts = np.zeros(batch, np.int32)
        self._lengths = np.zeros(batch, np.int32)
        self._pages = np.zeros((batch, program.pages), np.int32)

    @property
    def tables(self) -> Tables:
        """Where the rows stand; numpy arrays, which compiled programs take as they are."""
        return Tables(self._starts, self._lengths, self._pages)  # pyright: ignore[reportArgumentType]

    def fill(self, step: Step, inputs: Sequence[Array]) -> list[int]:
        """Take the rows of a step.

        Args:
            step: Of this program.
            inputs: Of each of `Step.all_rows`.

        Returns:
            Where the first token of each of `Step.all_rows` stands.
        """
        self._lengths[:] = 0
        firsts = [place * self._program.row_tokens for place in range(len(step.rows))]
        for place, row in enumerate(step.rows):
            self._fill_row(place, firsts[place], row, inputs[place])
        if step.chunk is not None:
            firsts.append(self._short_tokens)
            self._fill_row(self._program.rows, self._short_tokens, step.chunk, inputs[-1])
        return firsts

    def _fill_row(self, place: int, first: int, row: StepRow, inputs: Array) -> None:
        self._starts[place] = row.position
        self._lengths[place] = row.tokens
        self._pages[place, : len(row.pages)] = row.pages
        self.inputs[first : first + row.tokens] = inputs

    def fill_warm(self, context_tokens: int) -> None:
        """Take rows of the scratch page, as full as the program and a context let them be."""
        program = self._program
        self._starts[:], self._pages[:] = 0, 0
        self._lengths[: program.rows] = min(program.row_tokens, context_tokens)
        self._lengths[program.rows :] = min(program.chunk_tokens, context_tokens)


def tokens_of(firsts: Sequence[int], rows: Sequence[StepRow]) -> Int32 | slice:
    """Return where each token of some rows stands, row after row.

    Rows without padding between them are a slice, which copies nothing.
    """
    ends = [first + row.tokens for first, row in zip(firsts, rows, strict=True)]
    if firsts[0] == 0 and ends[:-1] == firsts[1:]:
        return slice(0, ends[-1])
    parts = [np.arange(first, end) for first, end in zip(firsts, ends, strict=True)]
    return np.concatenate(parts).astype(np.int32)
