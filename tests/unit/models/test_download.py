import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError

from pals.errors import HubUnavailable
from pals.models.download import Cancelled, Patience, Tries, retry_after, will_pass

PATIENCE = Patience(attempts=3, backoff_s=0.001, max_wait_s=0.01)


def answer(status: int, **headers: str) -> HfHubHTTPError:
    request = httpx.Request("GET", "http://hub.test/")
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return HfHubHTTPError("x", response=httpx.Response(status, headers=named, request=request))


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("0", 0), ("17", 17), ("-3", 0), ("soon", 0), ("", 0), ("9" * 400, 999_999_999)],
)
def test_retry_after_is_read_as_seconds(value: str, seconds: float):
    assert retry_after(answer(429, retry_after=value)) == seconds


def test_retry_after_is_read_as_a_date():
    later = datetime.now(UTC) + timedelta(seconds=100)
    assert 90 < retry_after(answer(503, retry_after=format_datetime(later, usegmt=True))) <= 100
    past = datetime.now(UTC) - timedelta(seconds=100)
    assert retry_after(answer(503, retry_after=format_datetime(past, usegmt=True))) == 0


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (answer(503), True),
        (answer(404), False),
        (httpx.ReadTimeout("slow"), True),
        (httpx.ConnectError("refused"), True),
        (httpx.UnsupportedProtocol("ftp"), False),
        (ValueError("other"), False),
    ],
)
def test_only_failures_of_the_moment_are_tried_again(error: Exception, passes: bool):
    assert will_pass(error) == passes


def test_attempts_are_counted_and_end():
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise httpx.ConnectError("refused")

    with pytest.raises(HubUnavailable, match="refused"):
        Tries("org/tiny", PATIENCE, threading.Event()).call(fail)
    assert len(calls) == PATIENCE.attempts


def test_a_cancelled_download_waits_no_longer():
    cancelled = threading.Event()
    cancelled.set()
    patience = Patience(backoff_s=50)
    with pytest.raises(Cancelled):
        Tries("org/tiny", patience, cancelled).wait(httpx.ConnectError("refused"))
