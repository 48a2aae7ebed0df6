"""The memory of pages as a step changes it, with tokens in place of keys and values."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pals.engine.batch import Step, StepRow
from pals.engine.pages import SCRATCH_PAGE, PageCopy

UNWRITTEN = -1


def next_token(history: Iterable[int], seed: int = 0) -> int:
    """Return the token that a deterministic model makes of all tokens before it."""
    return zlib.crc32(array("i", [*history, seed])) % 997


@dataclass
class PageMemory:
    """Pages of tokens: what a compiled step does to them, and nothing else."""

    num_pages: int
    page_tokens: int
    pages: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.pages = [[UNWRITTEN] * self.page_tokens for _ in range(self.num_pages + 1)]

    def copy(self, copies: Sequence[PageCopy]) -> None:
        """Copy as a gather followed by a scatter does."""
        targets = [c.target for c in copies]
        assert len(set(targets)) == len(targets)
        assert SCRATCH_PAGE not in targets
        contents = [list(self.pages[c.source]) for c in copies]
        for target, content in zip(targets, contents, strict=True):
            self.pages[target] = content

    def write(self, table: Sequence[int], position: int, tokens: Sequence[int]) -> None:
        for offset, token in enumerate(tokens, position):
            page = table[offset // self.page_tokens]
            assert page != SCRATCH_PAGE
            self.pages[page][offset % self.page_tokens] = token

    def read(self, table: Sequence[int], length: int) -> list[int]:
        pages = table[: -(-length // self.page_tokens)]
        return [token for page in pages for token in self.pages[page]][:length]

    def run(self, step: Step, inputs: dict[bytes, list[int]]) -> dict[bytes, list[list[int]]]:
        """Run a step; return what tokens see, one history for each: of a chunk the last alone.

        Args:
            step: As planned.
            inputs: The tokens of each row.
        """
        self.copy(step.copies)
        self._check_nobody_reads_what_others_write(step.all_rows)
        for row in step.all_rows:
            assert len(inputs[row.session]) == row.tokens
            self.write(row.pages, row.position, inputs[row.session])
        return {
            row.session: [self.read(row.pages, end) for end in range(row.position + 1, row.end + 1)]
            for row in step.all_rows
        }

    def _check_nobody_reads_what_others_write(self, rows: Sequence[StepRow]) -> None:
        for row in rows:
            written = set(row.pages[row.position // self.page_tokens :])
            others = {page for other in rows if other is not row for page in other.pages}
            assert not written & others
