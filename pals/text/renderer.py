"""The process that renders a chat template within limits; started by `template`.

Run as a script with a socket as standard input: the first request is the template's
source, every later one the variables of one rendering; each gets one `Answer`. It
imports nothing of Pals, so that it starts quickly and holds nothing worth stealing.

The environment equals the one of `transformers.utils.chat_template_utils`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import socket
from collections.abc import Callable
from datetime import datetime
from typing import TypedDict

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_MESSAGE_BYTES = 64 << 20
MAX_OUTPUT_CHARACTERS = 4 << 20
MAX_MEMORY_BYTES = 512 << 20
MAX_CPU_S = 10
MAX_PROBLEM_CHARACTERS = 500


class Answer(TypedDict):
    """The text of a rendering, or the problem that prevented it."""

    text: str | None
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


def serve(connection: socket.socket, *, before_each: Callable[[], None]) -> None:
    """Answer requests until the other side closes; ``before_each`` renews the limits.

    Raises:
        EOFError: It has closed.
    """
    template: jinja2.Template | None = None
    while True:
        request = json.loads(receive(connection))
        before_each()
        try:
            if isinstance(request, str):
                template, text = compile_template(request, now=datetime.now), ""
            else:
                assert template is not None
                text = render(template, request)
            answer = Answer(text=text, problem=None)
        except Exception as error:  # a template may raise anything: that is an answer too
            problem = f"{type(error).__name__}: {error}"[:MAX_PROBLEM_CHARACTERS]
            answer = Answer(text=None, problem=problem)
        send(connection, json.dumps(answer).encode())


def _allow_cpu_time() -> None:
    """Let the process use `MAX_CPU_S` more, even if nobody is left to stop it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(used.ru_utime + used.ru_stime) + MAX_CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def _limit_memory() -> None:
    # macOS knows the limit but refuses to set it; the deadline still holds there
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))


def main() -> None:
    """Serve the socket that is standard input."""
    _limit_memory()
    with socket.socket(fileno=os.dup(0)) as connection, contextlib.suppress(EOFError, OSError):
        serve(connection, before_each=_allow_cpu_time)


if __name__ == "__main__":
    main()
