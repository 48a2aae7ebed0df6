"""Text that arrives in pieces, and readers of it that never see where it was cut.

A reader is a generator. It yields pieces of the answer, and None where it needs more text than
there is; what it does may depend on the characters it has read, and never on how many more lie
ready, so that every cut of a text gives the same pieces, joined.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from pals.text.answers.pieces import Content, Piece, Reasoning, ToolArguments

MAX_GAP_CHARACTERS = 256
"""White space that may be held back, because a mark after it makes it the format's own."""

_T = TypeVar("_T")

Reader = Generator[Piece | None, None, _T]
"""Yields pieces, and None for more text; returns what it found out."""


class Source:
    """The text that is not read yet.

    Attributes:
        text: As much of it as is there.
        ended: No more will come.
        strays: Names of special tokens, which are never shown, wherever they stand.
    """

    def __init__(self, strays: Sequence[str] = ()) -> None:
        self.text = ""
        self.ended = False
        self.strays = strays

    def take(self, size: int) -> str:
        """Remove the next ``size`` characters, or what there is of them, and return them."""
        taken, self.text = self.text[:size], self.text[size:]
        return taken

    def look(self, marks: Sequence[str]) -> tuple[int, str | None]:
        """Look for the first mark; none may be the beginning of another.

        Returns:
            How many characters certainly belong to none, and the mark that follows them,
            None while it is not there as a whole.
        """
        found = [(at, mark) for mark in marks if (at := self.text.find(mark)) >= 0]
        if found:
            return min(found)
        return len(self.text) - (0 if self.ended else self._begun(marks)), None

    def _begun(self, marks: Sequence[str]) -> int:
        """Return the length of the longest end of the text that begins a mark."""
        longest = max(map(len, marks), default=1) - 1
        for size in range(min(longest, len(self.text)), 0, -1):
            if any(mark.startswith(self.text[-size:]) for mark in marks):
                return size
        return 0


def until(
    source: Source,
    marks: Sequence[str],
    make: Callable[[str], Content | Reasoning],
    *,
    gap: str = "",
) -> Reader[str | None]:
    """Yield the text before the next mark, and take the mark.

    White space right before it is the format's and left out, up to `MAX_GAP_CHARACTERS`.

    Args:
        source: The text.
        marks: What to look for.
        make: Makes a piece of text.
        gap: Text that was taken before and belongs to it.

    Returns:
        The mark; None at the end of the text.
    """
    while True:
        size, mark = source.look([*marks, *source.strays])
        text = gap + source.take(size)
        kept = len(text.rstrip()) if marks else len(text)
        kept = max(kept, len(text) - MAX_GAP_CHARACTERS)
        if source.ended and mark is None:
            kept = len(text)
        if kept:
            yield make(text[:kept])
        gap = text[kept:]
        if mark is not None:
            source.take(len(mark))
            if mark in marks:
                return mark
        elif source.ended:
            return None
        else:
            yield None


def skip_space(source: Source) -> Reader[None]:
    """Take white space, up to the first other character or the end."""
    while True:
        source.text = source.text.lstrip()
        if source.text or source.ended:
            return
        yield None


def take_mark(source: Source, mark: str) -> Reader[bool]:
    """Take ``mark`` and white space before it, if that is what comes next; else nothing."""
    while True:
        ahead = source.text.lstrip()
        gap = len(source.text) - len(ahead)
        if gap > MAX_GAP_CHARACTERS or not mark.startswith(ahead[: len(mark)]):
            return False
        if len(ahead) >= len(mark):
            source.take(gap + len(mark))
            return True
        if source.ended:
            return False
        yield None


class ReaderParser:
    """An `AnswerParser` that is a reader.

    Attributes:
        ended: The reader needs no more text: the answer is over.
    """

    def __init__(self, source: Source, reader: Reader[None]) -> None:
        self._source = source
        self._reader = reader
        self.ended = False

    def push(self, text: str) -> list[Piece]:
        """Take the next text; return the pieces that no later text can change."""
        if self.ended:
            return []
        self._source.text += text
        return self._run()

    def finish(self) -> list[Piece]:
        """Return what was held back: the answer ends here."""
        if self.ended:
            return []
        self._source.ended = True
        return self._run()

    def _run(self) -> list[Piece]:
        pieces: list[Piece] = []
        for piece in self._reader:
            if piece is None:
                return pieces
            _append(pieces, piece)
        self.ended = True
        return pieces


def _append(pieces: list[Piece], piece: Piece) -> None:
    """Add a piece, joined to the last one if that is of the same kind."""
    last = pieces[-1] if pieces else None
    if isinstance(piece, Content) and isinstance(last, Content):
        pieces[-1] = Content(last.text + piece.text)
    elif isinstance(piece, Reasoning) and isinstance(last, Reasoning):
        pieces[-1] = Reasoning(last.text + piece.text)
    elif (
        isinstance(piece, ToolArguments)
        and isinstance(last, ToolArguments)
        and piece.index == last.index
    ):
        pieces[-1] = ToolArguments(piece.index, last.text + piece.text)
    else:
        pieces.append(piece)
