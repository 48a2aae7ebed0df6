"""Logs of a server on stderr: lines for people, or JSON for programs."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal, TextIO, cast

import msgspec

LogFormat = Literal["text", "json"]


def configure_logs(form: LogFormat, stream: TextIO | None = None) -> None:
    """Write what Pals has to say to ``stream``, stderr by default, and others' warnings."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("pals").setLevel(logging.INFO)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, event, and the fields of the event."""

    def format(self, record: logging.LogRecord) -> str:
        return msgspec.json.encode(
            {
                "time": _time_of(record),
                "level": record.levelname.lower(),
                "logger": record.name,
                "event": record.getMessage(),
                **fields_of(record),
            }
        ).decode()


class TextFormatter(logging.Formatter):
    """Time, level, event, and its fields as ``name=value``, on one line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in fields_of(record).items())
        text = f"{_time_of(record)} {record.levelname.lower()} {record.getMessage()}{fields}"
        # A line of its own, or an escape of the terminal, would be somebody else's words.
        return "".join(letter if letter.isprintable() else " " for letter in text)


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """Return what was logged under ``extra={"fields": …}``, and where an exception arose.

    Not the exception's own text, which may quote what people sent.
    """
    fields = dict(cast("Mapping[str, object]", getattr(record, "fields", {})))
    if record.exc_info and record.exc_info[0] is not None:
        fields["error"] = record.exc_info[0].__name__
        frames = traceback.extract_tb(record.exc_info[2])
        fields["at"] = " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(frames))
    return fields


def _time_of(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, tz=UTC)
    return moment.isoformat(timespec="milliseconds")
