from __future__ import annotations

from dataclasses import replace

import pytest
from litestar.types import HTTPScope

from pals.api.gate import GateSettings
from pals.api.gate.checks import (
    check_api_key,
    check_content,
    check_host,
    check_no_content,
    check_origin,
)
from pals.errors import (
    BodyTooLarge,
    HostRefused,
    InvalidApiKey,
    InvalidRequest,
    OriginRefused,
    UnsupportedMediaType,
)
from tests.integration.api.servers import only_key

LOOPBACK = GateSettings.for_bind("127.0.0.1", 8080)
KEY = "correct horse battery"
KEYED = GateSettings.for_bind("127.0.0.1", 8080, keys=only_key(KEY))
SITE = "https://app.example"
SHARED = replace(LOOPBACK, origins=frozenset({SITE}))


def scope(*headers: tuple[str, str], arrived_at: str = "127.0.0.1") -> HTTPScope:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    return {  # pyright: ignore[reportReturnType] # what is read
        "type": "http",
        "method": "GET",
        "headers": raw,
        "server": (arrived_at, 8080),
    }


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


def test_a_wildcard_bind_takes_the_address_at_which_a_connection_arrived() -> None:
    settings = GateSettings.for_bind("0.0.0.0", 8080, keys=only_key(KEY))

    check_host(scope(("host", "192.168.1.5:8080"), arrived_at="192.168.1.5"), settings)
    check_host(scope(("host", "[fd00::5]:8080"), arrived_at="fd00::5"), settings)
    check_host(scope(("host", "192.168.1.5:8080"), arrived_at="::ffff:192.168.1.5"), settings)
    check_host(scope(("host", "localhost:8080")), settings)


@pytest.mark.parametrize(
    "host",
    ["evil.example:8080", "192.168.1.6:8080", "192.168.1.5:80", "192.168.1.5", "localhost:8080"],
)
def test_a_wildcard_bind_takes_no_other_host(host: str) -> None:
    settings = GateSettings.for_bind("0.0.0.0", 8080, keys=only_key(KEY))

    with pytest.raises(HostRefused):
        check_host(scope(("host", host), arrived_at="192.168.1.5"), settings)


def test_an_origin_of_the_same_host_is_accepted() -> None:
    assert check_origin(scope(("origin", "http://localhost:8080")), LOOPBACK) is None
    assert check_origin(scope(), LOOPBACK) is None


def test_an_allowed_site_is_named_as_the_browser_wrote_it() -> None:
    assert check_origin(scope(("origin", SITE)), SHARED) == SITE
    with pytest.raises(OriginRefused):
        check_origin(scope(("origin", SITE), ("origin", "http://evil.example")), SHARED)


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
    for scheme in ("Bearer", "bearer"):
        headers = scope(("authorization", f"{scheme} {KEY}"))
        assert check_api_key(headers, KEYED) == "environment"


def test_nobody_is_named_where_no_key_is_asked_for() -> None:
    assert check_api_key(scope(("authorization", f"Bearer {KEY}")), LOOPBACK) is None


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


def test_a_body_that_says_it_is_too_long_is_not_read() -> None:
    headers = [("content-type", "application/json"), ("content-length", str(5 << 20))]
    with pytest.raises(BodyTooLarge):
        check_content(scope(*headers), LOOPBACK)


@pytest.mark.parametrize("headers", [("content-length", "1"), ("transfer-encoding", "chunked")])
def test_a_body_where_none_is_read_is_refused(headers: tuple[str, str]) -> None:
    check_no_content(scope(("content-length", "0")))
    with pytest.raises(InvalidRequest):
        check_no_content(scope(headers))
