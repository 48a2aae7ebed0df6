"""The model's chat template, rendered in a child process.

A template is a program that came with the weights. Jinja's sandbox keeps it from
reaching Python, but not from looping for hours or asking for gigabytes, so that it runs
in a process with limits (`renderer`), which is killed when it exceeds them.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import msgspec

from pals.errors import CorruptModel, InvalidText, TemplateError
from pals.text import renderer
from pals.text.files import load_settings, load_special_tokens, load_text

MAX_TEMPLATE_BYTES = 1 << 20
RENDER_DEADLINE_S = 5.0
START_DEADLINE_S = 30.0


class ChatTemplate:
    """A chat template, ready to render; safe to use from any thread.

    The child process lives as long as this object and is started again after a template
    was stopped for exceeding its limits.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Start the child and compile ``source``.

        Raises:
            TemplateError: The template does not compile.
        """
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._lock = threading.Lock()
        self._child = _Child(source)

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate:
        """Read chat_template.jinja, or else ``chat_template`` of tokenizer_config.json.

        Raises:
            CorruptModel: A file is too large or does not parse.
            TemplateError: There is no template, or it does not compile.
        """
        source = load_text(folder / "chat_template.jinja", maximum=MAX_TEMPLATE_BYTES)
        if source is None:
            source = _configured_template(folder / "tokenizer_config.json")
        if source is None:
            raise TemplateError(problem=f"there is none in {folder}")
        return cls(source, load_special_tokens(folder))

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> str:
        """Return the prompt text of a conversation, as transformers renders it.

        Args:
            messages: Objects with ``role`` and ``content``, in order.
            add_generation_prompt: End with the opening of the assistant's turn.
            tools: OpenAI tool objects for templates that know them.

        Raises:
            TemplateError: The template refuses the messages, fails, or exceeds its time,
                memory or output.
            InvalidText: The messages hold half a surrogate pair.
        """
        variables = {
            **self._special_tokens,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            request = msgspec.json.encode(variables)
        except UnicodeEncodeError:
            raise InvalidText(problem="a message holds half a surrogate pair") from None
        with self._lock:
            if not self._child.alive:
                self._child = _Child(self._source)
            return self._child.ask(request, RENDER_DEADLINE_S)

    def close(self) -> None:
        """End the child process now; a later render starts another."""
        with self._lock:
            self._child.stop()


class _Child:
    """One renderer process and the socket to it."""

    def __init__(self, source: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(  # noqa: S603 our own file, no shell
                [sys.executable, "-I", renderer.__file__],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_child_environment(),
            )
        self._socket = ours
        self.stop = weakref.finalize(self, _stop, process, ours)
        try:
            self.ask(msgspec.json.encode(source), START_DEADLINE_S)
        except TemplateError:
            self.stop()
            raise

    @property
    def alive(self) -> bool:
        return self.stop.alive

    def ask(self, request: bytes, deadline_s: float) -> str:
        """Send one request and return its answer; a child that gives none is stopped.

        Raises:
            TemplateError: The answer is a problem, or there is none in time.
        """
        self._socket.settimeout(deadline_s)
        try:
            renderer.send(self._socket, request)
            answer = msgspec.json.decode(renderer.receive(self._socket), type=renderer.Answer)
        except TimeoutError:
            self.stop()
            raise TemplateError(problem=f"no result within {deadline_s:g} s") from None
        except (OSError, EOFError, ValueError):
            self.stop()
            raise TemplateError(problem="the process that renders it was ended") from None
        if answer["text"] is None:
            raise TemplateError(problem=answer["problem"])
        return answer["text"]


def _child_environment() -> dict[str, str]:
    """Return what a Python needs to start and to know the local time, and no secret."""
    names = ("LD_LIBRARY_PATH", "TZ")
    return {name: os.environ[name] for name in names if name in os.environ}


def _stop(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()


def _configured_template(path: Path) -> str | None:
    """Return ``chat_template``: a string, or of several named ones the default.

    Raises:
        CorruptModel: It is something else.
    """
    value = load_settings(path).get("chat_template")
    if isinstance(value, list):
        named = cast("list[object]", value)
        entries = [cast("dict[str, object]", entry) for entry in named if isinstance(entry, dict)]
        value = next((e.get("template") for e in entries if e.get("name") == "default"), None)
    if value is not None and not isinstance(value, str):
        raise CorruptModel(source=path, problem="`chat_template` is not a string")
    return value
