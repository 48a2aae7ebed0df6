"""The process in which chat templates, tokenizers and grammars run; started by `child`.

Others wrote them, and they are programs of a kind: a template may loop for hours, a regular
expression of a tokenizer or a grammar too, and any may ask for gigabytes. Run as a script
with a socket as standard input, it answers each request with one `Answer`, within limits
that it renews for every request. It imports nothing of Pals, so that it starts quickly
and holds nothing worth stealing.

The template's environment equals the one of `transformers.utils.chat_template_utils`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import resource
import socket
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    import tokenizers

    from pals.text.masks import Masks

MAX_MESSAGE_BYTES = 80 << 20
MAX_OUTPUT_CHARACTERS = 4 << 20
MAX_TEMPLATE_MEMORY_BYTES = 512 << 20
MAX_TOKENIZER_MEMORY_BYTES = 1 << 30
MAX_GRAMMARS_MEMORY_BYTES = 1 << 30
"""Of all grammars of a process together, beside what it has when the first one comes."""
MAX_CPU_S = 10
SLOWEST_BYTES_PER_S = 100_000
"""What a tokenizer is given time for: a fraction of what any of them does on one core."""
MAX_PROBLEM_CHARACTERS = 500

START = b"A"
LOAD_TEMPLATE, RENDER = b"T", b"R"
LOAD_TOKENIZER, ENCODE, ENCODE_WITH_SPECIAL_TOKENS = b"K", b"E", b"S"
LOAD_VOCABULARY, MASK = b"V", b"M"
"""First byte of a request: what its other bytes are. Nothing, a template's source, the variables
of one rendering in JSON, the content of tokenizer.json, a text, what `masks.Masks` takes, a
`masks.MaskRequest`."""


class Answer(TypedDict):
    """The text of a rendering or a mask, the ids of a text, or the problem that prevented it."""

    text: str | None
    ids: list[int] | None
    problem: str | None


# --- messages ------------------------------------------------------------------------


def send(connection: socket.socket, payload: bytes) -> None:
    """Send one message: its length in 4 big-endian bytes, then the payload."""
    connection.sendall(len(payload).to_bytes(4, "big") + payload)


def receive(connection: socket.socket) -> bytes:
    """Return the next message.

    Raises:
        EOFError: The other side has closed.
        ValueError: The message is larger than any can be.
        OSError: The socket failed, or its timeout ran out.
    """
    size = int.from_bytes(_receive_exactly(connection, 4), "big")
    if size > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {size} bytes")
    return _receive_exactly(connection, size)


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        part = connection.recv(min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


# --- the template's environment ------------------------------------------------------


class _GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's words for training; it prints its body."""

    tags = {"generation"}  # noqa: RUF012 jinja2 declares it as an instance variable

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(source: str, *, now: Callable[[], datetime]) -> jinja2.Template:
    """Compile a chat template in the sandbox.

    Raises:
        jinja2.TemplateError: The source is no template.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json

    def strftime_now(form: str) -> str:
        return now().strftime(form)

    functions = {"raise_exception": _raise_exception, "strftime_now": strftime_now}
    return environment.from_string(source, globals=functions)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Encode for a prompt: unlike jinja's own filter it does not escape HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(problem: str) -> None:
    raise jinja2.TemplateError(problem)


def render(template: jinja2.Template, variables: dict[str, object]) -> str:
    """Render piece by piece, and stop when the text grows past what a prompt can be.

    Raises:
        jinja2.TemplateError: The template refuses, or its text is too long.
    """
    pieces: list[str] = []
    room = MAX_OUTPUT_CHARACTERS
    for piece in template.generate(variables):
        room -= len(piece)
        if room < 0:
            raise jinja2.TemplateError(f"more than {MAX_OUTPUT_CHARACTERS} characters of output")
        pieces.append(piece)
    return "".join(pieces)


# --- the process ---------------------------------------------------------------------


class Sandbox:
    """Template, tokenizer and vocabulary of one model, once they are loaded."""

    def __init__(self) -> None:
        self._template: jinja2.Template | None = None
        self._tokenizer: tokenizers.Tokenizer | None = None
        self._masks: Masks | None = None

    def answer(self, request: bytes) -> Answer:
        """Do what a request asks for; see the module's constants.

        A template may raise anything, and a panic of the tokenizer library is no
        `Exception`: all of it is an answer too.
        """
        try:
            text, ids = self._do(request[:1], request[1:])
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            problem = f"{type(error).__name__}: {error}"[:MAX_PROBLEM_CHARACTERS]
            return Answer(text=None, ids=None, problem=problem)
        return Answer(text=text, ids=ids, problem=None)

    def _do(self, kind: bytes, content: bytes) -> tuple[str | None, list[int] | None]:
        if kind == START:
            return "", None
        if kind == LOAD_TEMPLATE:
            self._template = compile_template(content.decode(), now=datetime.now)
            return "", None
        if kind == RENDER:
            assert self._template is not None
            return render(self._template, json.loads(content)), None
        if kind == LOAD_TOKENIZER:
            self._tokenizer = load_tokenizer(content.decode())
            return "", None
        if kind == LOAD_VOCABULARY:
            self._masks = _load_masks(content.decode())
            return "", None
        if kind == MASK:
            assert self._masks is not None
            return self._masks.answer(content), None
        assert self._tokenizer is not None
        special = kind == ENCODE_WITH_SPECIAL_TOKENS
        encoding = self._tokenizer.encode(content.decode(), add_special_tokens=special)
        return None, encoding.ids


def load_tokenizer(text: str) -> tokenizers.Tokenizer:
    """Make a tokenizer that neither pads nor truncates: that would be another prompt.

    Raises:
        Exception: The library refuses the text.
    """
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(text)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _load_masks(content: str) -> Masks:
    """Make what the file beside this one has: Pals is not on this process's path.

    Raises:
        Exception: The library refuses the vocabulary.
    """
    spec = importlib.util.spec_from_file_location("masks", Path(__file__).with_name("masks.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Masks(content)


def serve(connection: socket.socket, *, before_each: Callable[[bytes, int], None]) -> None:
    """Answer requests until the other side closes.

    Args:
        connection: The socket to the parent.
        before_each: Renews the limits for a request of the kind and size it is given.

    Raises:
        EOFError: The other side has closed.
    """
    sandbox = Sandbox()
    while True:
        request = receive(connection)
        before_each(request[:1], len(request))
        send(connection, json.dumps(sandbox.answer(request)).encode())


class Limits:
    """What the process may use for a request, even if nobody stops it."""

    def __init__(self) -> None:
        self._most_with_grammars: int | None = None

    def renew(self, kind: bytes, size: int) -> None:
        """Allow so much CPU time and memory more; grammars stay, and share what they may have."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        allowed_s = MAX_CPU_S + size / SLOWEST_BYTES_PER_S
        soft = math.ceil(used.ru_utime + used.ru_stime + allowed_s)
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
        # macOS has no /proc and refuses to set this limit; the deadline still holds there
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (self._memory(kind), resource.RLIM_INFINITY))

    def _memory(self, kind: bytes) -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        held = pages * resource.getpagesize()
        if kind == MASK:
            if self._most_with_grammars is None:
                self._most_with_grammars = held + MAX_GRAMMARS_MEMORY_BYTES
            return self._most_with_grammars
        is_template = kind in (LOAD_TEMPLATE, RENDER)
        return held + (MAX_TEMPLATE_MEMORY_BYTES if is_template else MAX_TOKENIZER_MEMORY_BYTES)


def main() -> None:
    """Serve the socket that is standard input."""
    with socket.socket(fileno=os.dup(0)) as connection, contextlib.suppress(EOFError, OSError):
        serve(connection, before_each=Limits().renew)


if __name__ == "__main__":
    main()
