from __future__ import annotations

import contextlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from litestar.types import HTTPScope

from pals.api import gate
from pals.api.gate import (
    GateSettings,
    check_api_key,
    check_content,
    check_host,
    check_json_depth,
    check_origin,
)
from pals.errors import (
    HostRefused,
    InvalidApiKey,
    InvalidConfig,
    InvalidRequest,
    OriginRefused,
    UnsupportedMediaType,
)

LOOPBACK = GateSettings.for_bind("127.0.0.1", 8080)
KEY = "correct horse battery"
KEYED = GateSettings.for_bind("127.0.0.1", 8080, api_key=KEY)


def scope(*headers: tuple[str, str]) -> HTTPScope:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    return {"type": "http", "headers": raw}  # pyright: ignore[reportReturnType] # what is read


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8080", "localhost:8080", "LocalHost:8080", "[::1]:8080"]
)
def test_loopback_names_of_the_port_are_its_hosts(host: str) -> None:
    check_host(scope(("host", host)), LOOPBACK)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "127.0.0.1",
        "127.0.0.1:8081",
        "127.0.0.1:8080.evil.example",
        "localhost.evil.example:8080",
        "127.0.0.2:8080",
        "10.0.0.1:8080",
        "",
    ],
)
def test_other_hosts_are_refused(host: str) -> None:
    with pytest.raises(HostRefused):
        check_host(scope(("host", host)), LOOPBACK)


def test_no_host_and_two_hosts_are_refused() -> None:
    own = ("host", "localhost:8080")
    for headers in ([], [own, own]):
        with pytest.raises(HostRefused):
            check_host(scope(*headers), LOOPBACK)


def test_forwarded_host_is_not_believed() -> None:
    headers = [("host", "evil.example"), ("x-forwarded-host", "localhost:8080")]
    with pytest.raises(HostRefused):
        check_host(scope(*headers), LOOPBACK)


def test_port_80_needs_no_port_in_the_host() -> None:
    check_host(scope(("host", "localhost")), GateSettings.for_bind("127.0.0.1", 80))


def test_a_wildcard_bind_takes_address_literals_but_no_foreign_names() -> None:
    settings = GateSettings.for_bind("0.0.0.0", 8080, api_key=KEY)

    check_host(scope(("host", "192.168.1.5:8080")), settings)
    check_host(scope(("host", "[fd00::5]:8080")), settings)
    with pytest.raises(HostRefused):
        check_host(scope(("host", "evil.example:8080")), settings)


def test_an_origin_of_the_same_host_is_accepted() -> None:
    check_origin(scope(("origin", "http://localhost:8080")), LOOPBACK)
    check_origin(scope(), LOOPBACK)


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "http://evil.example",
        "https://localhost:8080.evil.example",
        "http://localhost:3000",
        "file://",
        "",
    ],
)
def test_other_origins_are_refused(origin: str) -> None:
    with pytest.raises(OriginRefused):
        check_origin(scope(("origin", origin)), LOOPBACK)


def test_the_key_is_accepted_and_the_scheme_is_case_insensitive() -> None:
    check_api_key(scope(("authorization", f"Bearer {KEY}")), KEYED)
    check_api_key(scope(("authorization", f"bearer {KEY}")), KEYED)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", KEY)],
        [("authorization", f"Basic {KEY}")],
        [("authorization", f"Bearer {KEY}x")],
        [("authorization", f"Bearer {KEY[:-1]}")],
        [("authorization", "Bearer ")],
        [("authorization", f"Bearer {KEY}")] * 2,
        [("x-api-key", KEY)],
    ],
)
def test_requests_without_the_key_are_refused(headers: list[tuple[str, str]]) -> None:
    with pytest.raises(InvalidApiKey):
        check_api_key(scope(*headers), KEYED)


def test_settings_hold_no_key_in_clear() -> None:
    assert KEY not in repr(KEYED)


def test_a_short_key_is_refused() -> None:
    with pytest.raises(InvalidConfig) as caught:
        GateSettings.for_bind("127.0.0.1", 8080, api_key="short")

    assert "short" not in str(caught.value)


def test_json_with_a_charset_is_accepted() -> None:
    assert check_content(scope(("content-type", "Application/JSON; charset=utf-8")), LOOPBACK)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("content-type", "text/plain")],
        [("content-type", "application/x-www-form-urlencoded")],
        [("content-type", "multipart/form-data; boundary=x")],
        [("content-type", "application/json"), ("content-encoding", "gzip")],
        [("content-type", "application/json")] * 2,
    ],
)
def test_other_content_is_refused(headers: list[tuple[str, str]]) -> None:
    with pytest.raises(UnsupportedMediaType):
        check_content(scope(*headers), LOOPBACK)


def nested(depth: int) -> bytes:
    return b'{"a":[' * (depth // 2) + b"]}" * (depth // 2)


def test_depth_is_allowed_up_to_the_limit() -> None:
    check_json_depth(nested(64))
    with pytest.raises(InvalidRequest):
        check_json_depth(nested(66))


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 100_000, b"[" * 65 + b"]" * 65])
def test_deep_or_unbalanced_nesting_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        check_json_depth(body)


@given(st.text(alphabet='[]{}"\\ab\n'))
def test_brackets_inside_strings_do_not_count(text: str) -> None:
    import msgspec

    check_json_depth(msgspec.json.encode({"a": [text, {"b": text}]}))


@pytest.mark.parametrize("unit", [b'\\"', b'"', b"\\", b'"\\', b"[]", b'"[', b"a"])
def test_the_depth_check_is_linear(unit: bytes) -> None:
    body = unit * (gate.MAX_BODY_BYTES // len(unit))

    started = time.process_time()
    with contextlib.suppress(InvalidRequest):
        check_json_depth(b'"' + body)

    assert time.process_time() - started < 2
