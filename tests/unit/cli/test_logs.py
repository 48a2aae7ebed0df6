from __future__ import annotations

import io
import json
import logging

import pytest

from pals.cli.logs import LogFormat, configure_logs


def logged(form: LogFormat) -> list[str]:
    stream = io.StringIO()
    configure_logs(form, stream)
    logger = logging.getLogger("pals.api.observed")
    logger.info("request", extra={"fields": {"status": 200, "ms": 1.5}})
    logger.debug("not shown")
    logging.getLogger("other").info("not shown")
    logging.getLogger("other").warning("a\nb \x1b[31m%s", "c")
    try:
        int("canary")
    except ValueError:
        logger.exception("failed")
    return stream.getvalue().splitlines()


def test_json_lines_hold_the_fields_of_an_event() -> None:
    request, warning, failure = (json.loads(line) for line in logged("json"))
    assert request.pop("time").endswith("+00:00")
    assert request == {
        "level": "info",
        "logger": "pals.api.observed",
        "event": "request",
        "status": 200,
        "ms": 1.5,
    }
    assert warning["event"] == "a\nb \x1b[31mc"
    assert failure["error"] == "ValueError"
    assert failure["at"].startswith("logged:")


def test_text_is_one_printable_line_for_each_event() -> None:
    request, warning, failure = logged("text")
    assert request.endswith(" info request status=200 ms=1.5")
    assert warning.endswith(" warning a b  [31mc")
    assert "error=ValueError" in failure


@pytest.mark.parametrize("form", ["json", "text"])
def test_text_of_an_exception_is_not_logged(form: LogFormat) -> None:
    assert not [line for line in logged(form) if "canary" in line]
