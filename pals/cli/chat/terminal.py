"""Reading turns from the terminal: editing and history by readline, several lines at once.

The standard library's readline edits lines, keeps and searches history (Ctrl-R) and takes a
pasted text whole; a library for full-screen programs would do no more for a prompt like this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec

from pals import config
from pals.cli.chat.conversation import NAMES
from pals.errors import InvalidConfig, ProfileMissing

try:
    import readline
except ImportError:  # a Python that was built without it reads plain lines
    readline = None

PROMPT = ">>> "
MORE = "... "
QUOTES = '"""'
MAX_HISTORY = 500
MAX_HISTORY_BYTES = 1 << 20

_Entries = Annotated[list[str], msgspec.Meta(max_length=MAX_HISTORY)]


class History:
    """The turns of earlier conversations, in one private file of the profile.

    Args:
        path: Where; None keeps nothing beyond this conversation.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._entries: list[str] = []

    def load(self) -> list[str]:
        """Return what was said before, the oldest first.

        Raises:
            ProfileExposed: Others can read the file.
            InvalidConfig: The file is damaged.
        """
        if self._path is None:
            return []
        try:
            data = config.read_private(self._path, max_bytes=MAX_HISTORY_BYTES)
            self._entries = msgspec.json.decode(data, type=_Entries)
        except ProfileMissing:
            return []
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise InvalidConfig(
                source=self._path, problem=str(error), advice="remove it; it is written anew"
            ) from error
        return list(self._entries)

    def add(self, text: str) -> None:
        """Keep a turn, and write the file anew; the oldest turns make room."""
        if self._path is None or text in self._entries[-1:]:
            return
        self._entries = [*self._entries, text][-MAX_HISTORY:]
        while len(data := msgspec.json.encode(self._entries)) > MAX_HISTORY_BYTES:
            del self._entries[0]
        config.write_private(self._path, data)


class Terminal:
    """The user's side of a conversation.

    Args:
        history: What was said before.
        read_line: Shows a prompt and returns a line; raises `EOFError` at the end.
    """

    def __init__(self, history: History, read_line: Callable[[str], str] | None = None) -> None:
        self._history = history
        self._read_line = read_line or _read_line
        earlier = history.load()
        if readline is not None:
            readline.set_auto_history(False)
            readline.set_completer(_complete)
            readline.set_completer_delims(" ")
            readline.parse_and_bind("tab: complete")
            for entry in earlier:
                readline.add_history(entry)

    def read(self) -> str:
        r"""Return what the user says next.

        A line that ends in ``\`` goes on in the next; between two lines of three quotes are
        as many as one likes.

        Raises:
            EOFError: The user is done (Ctrl-D).
            KeyboardInterrupt: The user pressed Ctrl-C.
        """
        text = self._read_line(PROMPT)
        if text.lstrip().startswith(QUOTES):
            text = self._read_quoted(text.lstrip().removeprefix(QUOTES))
        while text.endswith("\\"):
            text = f"{text[:-1]}\n{self._read_line(MORE)}"
        if text.strip():
            self._remember(text)
        return text

    def _read_quoted(self, first: str) -> str:
        lines = [first]
        while not lines[-1].rstrip().endswith(QUOTES):
            lines.append(self._read_line(MORE))
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return "\n".join(lines).strip("\n")

    def _remember(self, text: str) -> None:
        self._history.add(text)
        if readline is not None:
            readline.add_history(text)

    @property
    def has_text(self) -> bool:
        """Whether something stood in the line that Ctrl-C ended."""
        return readline is not None and readline.get_line_buffer().strip() != ""


def _read_line(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    # Standard output is for the answers alone.
    sys.stderr.write(prompt)
    sys.stderr.flush()
    return input()


def _complete(text: str, number: int) -> str | None:
    with suppress(IndexError):
        return [f"{name} " for name in NAMES if text and name.startswith(text)][number]
    return None
