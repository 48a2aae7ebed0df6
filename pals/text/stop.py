"""Stop strings over a stream of text."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Hold text back while it may still turn into a stop string.

    The result depends on the text alone, never on how it is cut into pieces: the stop
    string that completes first wins, and of those that complete at one place the longest.
    After a hit nothing more is emitted.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Watch for ``stops``, none of which may be empty."""
        assert all(stops)
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self._hit = False

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece; return the text that is certain, and whether a stop was hit."""
        if self._hit:
            return "", True
        self._held += text
        start = self._find()
        if start is not None:
            self._hit = True
            emit, self._held = self._held[:start], ""
            return emit, True
        keep = self._open_length()
        split = len(self._held) - keep
        emit, self._held = self._held[:split], self._held[split:]
        return emit, False

    def finish(self) -> str:
        """Return what was held back, when the text ended without completing a stop."""
        held, self._held = self._held, ""
        return held

    def _find(self) -> int | None:
        """Return where the stop string that completes first begins."""
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _open_length(self) -> int:
        """Return the length of the longest end of the text that begins a stop string."""
        for length in range(min(len(self._held), self._longest - 1), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
