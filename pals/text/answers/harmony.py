"""OpenAI's harmony format, in which gpt-oss writes messages to several channels.

An answer follows upon ``<|start|>assistant`` and may consist of several messages; the head of
each names its channel and, of a call, the recipient:
``<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}<|call|>``.
"""

from __future__ import annotations

import re

from pals.text.answers.pieces import Content, Reasoning
from pals.text.answers.region import Calls, Region, read_call
from pals.text.answers.source import Reader, Source, until

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
HARMONY_MARKS = (START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN)

MAX_HEAD_CHARACTERS = 512

_ENDS = (START, END, CALL, RETURN)
_RECIPIENT = re.compile(r"to=functions\.([\w.-]+)", re.ASCII)
_GAP = "\n\n"


def harmony(source: Source, calls: Calls) -> Reader[None]:
    """Read messages until a call is made or the answer returned."""
    said: set[type] = set()
    mark: str | None = START
    while mark in (START, END) and not calls.over:
        head, begins = yield from _head(source)
        if not begins:
            # no message: a model that has lost the format is read as plain text
            mark = yield from until(source, _ENDS, Content, gap=head)
            continue
        recipient = _RECIPIENT.search(head)
        if recipient is not None and recipient[1] in calls.tools:
            region = Region(source, _ENDS)
            mark = yield from read_call(region, calls, _call(region, calls, recipient[1]))
            continue
        kind = Reasoning if _channel(head) == "analysis" else Content
        gap = _GAP if kind in said else ""
        said.add(kind)
        mark = yield from until(source, _ENDS, kind, gap=gap)


def _call(region: Region, calls: Calls, name: str) -> Reader[None]:
    yield from region.next()
    yield from region.stream_arguments(calls.open(name))


def _head(source: Source) -> Reader[tuple[str, bool]]:
    """Take the head of a message and the mark after it.

    Returns:
        The head; the text instead, and False, where none is written.
    """
    head = text = ""
    while True:
        size, mark = source.look(HARMONY_MARKS)
        more = source.take(size)
        head, text = head + more, text + more
        if len(text) > MAX_HEAD_CHARACTERS or mark in (END, CALL, RETURN):
            return text, False
        if mark is not None:
            source.take(len(mark))
            if mark == MESSAGE:
                return head, True
            head += mark
            if len(head) > 2 * MAX_HEAD_CHARACTERS:
                return text, False
        elif source.ended:
            return text, False
        else:
            yield None


def _channel(head: str) -> str:
    words = head.partition(CHANNEL)[2].replace("<", " ").split(maxsplit=1)
    return words[0] if words else ""
