"""Byte ranges of files on the hub, with retries that end.

The only module of `pals.models` that speaks HTTP itself. `huggingface_hub` gives the
address, the token, the file's metadata and the client; its own reader of safetensors
headers is not used, for it reads without bound what a server sends that ignores ranges.
"""

from __future__ import annotations

import email.utils
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
from huggingface_hub import (
    HfFileMetadata,
    constants,
    get_hf_file_metadata,  # pyright: ignore[reportUnknownVariableType] a bare dict in its type
    get_session,
    hf_hub_url,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import (
    build_hf_headers,  # pyright: ignore[reportUnknownVariableType] a bare dict in its type
)

from pals import __version__
from pals.errors import HubUnavailable, InvalidHubAnswer, ModelChanged
from pals.models.hub_errors import explain, reason
from pals.models.listing import ListedFile
from pals.models.safetensors import check_header_size

T = TypeVar("T")

OK, PARTIAL_CONTENT = 200, 206
RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
EXPIRED_STATUSES = frozenset({400, 401, 403, 404, 410})
"""What storage answers to an address whose signature is too old."""

HUB_ERRORS = (httpx.HTTPError, HfHubHTTPError, OSError)
"""What the hub's client raises when the hub, the network or the disk fails."""

MALFORMED_ANSWERS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
    httpx.InvalidURL,
)
"""What else it raises of an answer that is not the hub's: it trusts what it parses."""

_FILE_NAME = re.compile(r'(?:W/)?"?[A-Za-z0-9_+=.:-]{1,128}"?')


class Cancelled(Exception):
    """The download was given up, because another part of it failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a download waits, and for what.

    Attributes:
        attempts: Attempts in a row that bring less than ``progress_bytes``.
        backoff_s: First wait between two attempts; each is twice the one before.
        max_wait_s: The longest wait, and the longest ``Retry-After`` that is followed.
        connect_s: For a connection.
        read_s: For the next bytes of an answer.
        stall_s: For the next ``progress_bytes`` of an answer.
        progress_bytes: What counts as progress.
    """

    attempts: int = 5
    backoff_s: float = 0.5
    max_wait_s: float = 60.0
    connect_s: float = 10.0
    read_s: float = 30.0
    stall_s: float = 60.0
    progress_bytes: int = 1 << 16

    @property
    def timeout(self) -> httpx.Timeout:
        return httpx.Timeout(self.read_s, connect=self.connect_s)


class Tries:
    """Counts the failures in a row and waits between them."""

    def __init__(
        self,
        model: str,
        patience: Patience,
        cancelled: threading.Event,
        *,
        attempts: int | None = None,
    ) -> None:
        self._model = model
        self._patience = patience
        self._cancelled = cancelled
        self._attempts = attempts or patience.attempts
        self._failures = 0

    def start_again(self) -> None:
        self._failures = 0

    def wait(self, error: Exception) -> None:
        """Wait before the next attempt.

        Raises:
            HubUnavailable: There was one attempt too many, or the hub asks for more time.
            Cancelled: The download is given up.
        """
        self._failures += 1
        if self._failures >= self._attempts:
            raise HubUnavailable(model=self._model, problem=reason(error)) from error
        seconds = self._patience.backoff_s * 2 ** (self._failures - 1)
        seconds = max(min(seconds, self._patience.max_wait_s), retry_after(error))
        if seconds > self._patience.max_wait_s:
            problem = f"{reason(error)}; it asks to come back in {seconds:.0f} s"
            raise HubUnavailable(model=self._model, problem=problem) from error
        if self._cancelled.wait(seconds):
            raise Cancelled

    def call(self, function: Callable[[], T]) -> T:
        """Call a function of the hub's client until it returns or fails for good.

        Raises:
            HubUnavailable: As `wait`.
            Cancelled: As `wait`.
        """
        while True:
            try:
                return function()
            except (httpx.TransportError, HfHubHTTPError) as error:
                if not will_pass(error):
                    raise
                self.wait(error)


# --- ranges --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a file's bytes are fetched now, and the headers to do it with."""

    url: str
    headers: dict[str, str]
    is_elsewhere: bool


class RangeReader:
    """Reads byte ranges of one weight file; several threads may share it."""

    def __init__(
        self,
        model: str,
        commit: str,
        file: ListedFile,
        *,
        patience: Patience,
        cancelled: threading.Event,
    ) -> None:
        self.file = file
        self._model = model
        self._commit = commit
        self._patience = patience
        self._cancelled = cancelled
        self._lock = threading.Lock()
        self._place: _Place | None = None
        self._etag: str | None = None

    def read_head(self) -> bytes:
        """Return the length and the JSON table that open the safetensors file.

        Raises:
            CorruptModel: The table claims to be larger than can be.
            HubUnavailable: And the other errors of `read`.
        """
        head = bytearray()
        self.read(0, 8, head.extend)
        source = Path(self.file.name)
        header_bytes = check_header_size(bytes(head), source, self.file.size_bytes)
        self.read(8, 8 + header_bytes, head.extend)
        return bytes(head)

    def read(self, start: int, stop: int, take: Callable[[bytes], None]) -> None:
        """Hand the bytes ``[start, stop)`` of the file to ``take``, in order.

        Raises:
            HubUnavailable: The hub fails again and again.
            HubRefused: The token is missing, invalid or not enough.
            ModelChanged: The file is another one than the hub listed.
            InvalidHubAnswer: The answer is not the range that was asked for.
            Cancelled: The download was given up.
        """
        tries = Tries(self._model, self._patience, self._cancelled)
        position = mark = start
        while position < stop:
            try:
                for block in self._stream(position, stop):
                    take(block)
                    position += len(block)
            except (httpx.TransportError, HfHubHTTPError) as error:
                if not will_pass(error):
                    raise explain(error, self._model, self._commit) from error
                if position - mark >= self._patience.progress_bytes:
                    tries.start_again()
                    mark = position
                tries.wait(error)

    def _stream(self, start: int, stop: int) -> Iterator[bytes]:
        place = self._locate()
        headers = place.headers | {"Range": f"bytes={start}-{stop - 1}"}
        if self._etag is not None:
            headers["If-Range"] = self._etag
        with get_session().stream(
            "GET", place.url, headers=headers, timeout=self._patience.timeout, follow_redirects=True
        ) as answer:
            self._check(answer, start, stop, place)
            yield from self._body(answer, stop - start)

    def _body(self, answer: httpx.Response, size_bytes: int) -> Iterator[bytes]:
        left = size_bytes
        watch = _Watch(self._patience)
        for block in answer.iter_raw():
            left -= len(block)
            if left < 0:
                raise self._invalid("the answer has more bytes than were asked for")
            if self._cancelled.is_set():
                raise Cancelled
            watch.count(len(block))
            yield block
        if left:
            raise httpx.RemoteProtocolError(f"the answer ended {left} bytes early")

    def _check(self, answer: httpx.Response, start: int, stop: int, place: _Place) -> None:
        if place.is_elsewhere and answer.status_code in EXPIRED_STATUSES:
            self._forget(place)
            raise httpx.RemoteProtocolError(f"the storage answers {answer.status_code}")
        if answer.is_error:
            raise HfHubHTTPError(f"the hub answers {answer.status_code}", response=answer)
        if answer.status_code == OK and self._etag is not None:
            raise self._changed("it is another one than a moment ago")
        if answer.status_code != PARTIAL_CONTENT:
            raise self._invalid(f"the answer to a range request has status {answer.status_code}")
        expected = f"bytes {start}-{stop - 1}/{self.file.size_bytes}"
        stated = answer.headers.get("Content-Range", "")
        if stated != expected:
            raise self._invalid(f"the answer has {stated[:80]!r} instead of {expected!r}")
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise self._invalid("the answer is compressed")
        if int(answer.headers.get("Content-Length", stop - start)) != stop - start:
            raise self._invalid("the answer has another length than was asked for")
        self._check_etag(answer)

    def _check_etag(self, answer: httpx.Response) -> None:
        etag = answer.headers.get("ETag", "")
        if not etag.startswith('"'):  # a weak or missing one names no bytes
            return
        if self._etag is None:
            self._etag = etag
        if self._etag != etag:
            raise self._changed("it is another one than a moment ago")

    def _locate(self) -> _Place:
        """Return where the file is, having compared it with what the hub listed."""
        with self._lock:
            if self._place is None:
                self._place = self._ask()
            return self._place

    def _ask(self) -> _Place:
        headers = build_hf_headers(library_name="pals", library_version=__version__)
        url = hf_hub_url(
            self._model, self.file.name, revision=self._commit, endpoint=constants.ENDPOINT
        )
        metadata = self._metadata(url, headers)
        if metadata.size != self.file.size_bytes:
            raise self._changed(f"{metadata.size} bytes instead of {self.file.size_bytes}")
        if metadata.etag != self.file.sha256:
            raise self._changed("it has another hash than the hub listed")
        headers["Accept-Encoding"] = "identity"
        is_elsewhere = _origin(url) != _origin(metadata.location)
        if is_elsewhere:  # a signed address needs no token, and its host must not see it
            headers = {k: v for k, v in headers.items() if k.lower() != "authorization"}
        return _Place(metadata.location, headers, is_elsewhere)

    def _metadata(self, url: str, headers: dict[str, str]) -> HfFileMetadata:
        try:
            metadata = get_hf_file_metadata(url, timeout=self._patience.read_s, headers=headers)
            _origin(metadata.location)
        except HUB_ERRORS:
            raise
        except MALFORMED_ANSWERS as error:
            raise self._invalid(reason(error)) from error
        return metadata

    def _forget(self, place: _Place) -> None:
        with self._lock:
            if self._place is place:
                self._place = None

    def _changed(self, problem: str) -> ModelChanged:
        return ModelChanged(model=self._model, file=self.file.name, problem=problem)

    def _invalid(self, problem: str) -> InvalidHubAnswer:
        return InvalidHubAnswer(model=self._model, file=self.file.name, problem=problem)


class _Watch:
    """Ends an answer that drips."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._bytes = 0
        self._deadline = time.monotonic() + patience.stall_s

    def count(self, size_bytes: int) -> None:
        self._bytes += size_bytes
        now = time.monotonic()
        if self._bytes >= self._patience.progress_bytes:
            self._bytes = 0
            self._deadline = now + self._patience.stall_s
        elif now > self._deadline:
            raise httpx.ReadTimeout(f"fewer than {self._patience.progress_bytes} bytes in time")


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = httpx.URL(url)
    return parts.scheme, parts.host, parts.port


def bound_waits(patience: Patience) -> None:
    """Keep the hub's own client from following a ``Retry-After`` of hours."""
    _add_hook(_LongestWait(patience.max_wait_s))


def check_answers() -> None:
    """Keep the hub's own client from naming files after what an answer makes up."""
    _add_hook(_PlainNames())


def _add_hook(added: _LongestWait | _PlainNames) -> None:
    """Let a hook see each answer of the client, unless one of its class does."""
    hooks = get_session().event_hooks
    if not any(isinstance(hook, type(added)) for hook in hooks["response"]):
        hooks["response"].append(added)
        get_session().event_hooks = hooks


@dataclass(frozen=True, slots=True)
class _LongestWait:
    seconds: float

    def __call__(self, response: httpx.Response) -> None:
        if response.status_code not in RETRIED_STATUSES:
            return
        error = HfHubHTTPError("the hub asks for a long wait", response=response)
        if retry_after(error) > self.seconds:
            raise error


@dataclass(frozen=True, slots=True)
class _PlainNames:
    """Refuses a commit or hash with which a path would leave its folder.

    The client joins both to paths as they come. An answer to another method than HEAD
    names nothing.
    """

    def __call__(self, response: httpx.Response) -> None:
        if response.request.method != "HEAD":
            return
        for header in ("ETag", "X-Linked-ETag", "X-Repo-Commit"):
            value = response.headers.get(header)
            if value is not None and not _FILE_NAME.fullmatch(value):
                raise ValueError(f"{header} is {value[:80]!r}")


# --- failures ------------------------------------------------------------------------


def will_pass(error: Exception) -> bool:
    """Return whether another attempt may succeed."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in RETRIED_STATUSES
    return isinstance(error, httpx.TransportError) and not isinstance(
        error, httpx.UnsupportedProtocol
    )


def retry_after(error: Exception) -> float:
    """Return the seconds that an answer asks to wait, 0 when it does not."""
    if not isinstance(error, HfHubHTTPError):
        return 0.0
    value = error.response.headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (OverflowError, ValueError):
        return 0.0
