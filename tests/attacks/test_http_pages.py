"""H1 and H2: what web pages can make a browser send to an endpoint on its machine."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from tests.attacks.raw_http import CHAT, CHAT_PATH, Endpoint
from tests.fakes import FakeDriver
from tests.integration.api.servers import running

KEY = "a key of enough length"
SITE = "https://app.example"
HOSTS = [
    "evil.example",
    "evil.example:{port}",
    "127.0.0.1",
    "127.0.0.1:1",
    "127.0.0.1:{port}.evil.example",
    "localhost.evil.example:{port}",
    "10.1.2.3:{port}",
    "169.254.169.254:{port}",
    "user@127.0.0.1:{port}",
    "0.0.0.0:{port}",
    "[::ffff:127.0.0.1]:{port}",
    "",
]
ORIGINS = ["http://evil.example", "null", "https://localhost:{port}.evil.example", "file://"]


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


@pytest.fixture
def endpoint(driver: FakeDriver) -> Iterator[Endpoint]:
    with running(driver, origins=frozenset({SITE})) as url:
        yield Endpoint(url)


def of_port(text: str, endpoint: Endpoint) -> str:
    return text.replace("{port}", endpoint.netloc.rpartition(":")[2])


def test_h1_no_other_host_is_answered_for(endpoint: Endpoint, driver: FakeDriver) -> None:
    for host in HOSTS:
        for method, path in (("GET", "/v1/models"), ("GET", "/health"), ("POST", CHAT_PATH)):
            answer = endpoint.ask(method, path, host=of_port(host, endpoint))
            assert (answer.status, answer.code) == (421, "misdirected_request"), host
    assert endpoint.ask("GET", "/health").status == 200
    assert not driver.calls


def test_h1_no_host_or_two_are_refused(endpoint: Endpoint) -> None:
    own, other = f"Host: {endpoint.netloc}", "Host: evil.example"

    answers = [
        endpoint.ask("GET", "/v1/models", host=None),
        endpoint.send(b"GET /v1/models HTTP/1.0\r\n\r\n"),
        endpoint.ask("GET", "/v1/models", other),
        endpoint.ask("GET", "/v1/models", own),
    ]

    assert [answer.status for answer in answers] == [400, 421, 400, 400]


@pytest.mark.parametrize("name", ["X-Forwarded-Host", "Forwarded", "X-Host", "X-Original-Host"])
def test_h1_what_a_proxy_may_have_said_is_not_believed(endpoint: Endpoint, name: str) -> None:
    value = endpoint.netloc if name != "Forwarded" else f"host={endpoint.netloc}"

    assert endpoint.ask("GET", "/v1/models", f"{name}: {value}", host="evil.example").status == 421


def test_h1_a_wildcard_bind_answers_for_the_address_that_was_reached_alone() -> None:
    with running(FakeDriver(), api_key=KEY, host="0.0.0.0") as url:
        endpoint = Endpoint(url.replace("0.0.0.0", "127.0.0.1"))
        allowed = f"Authorization: Bearer {KEY}"
        for host in HOSTS:
            answer = endpoint.ask("GET", "/v1/models", allowed, host=of_port(host, endpoint))
            assert answer.status == 421, host
        own = socket.gethostname()
        answer = endpoint.ask(
            "GET", "/v1/models", allowed, host=of_port(f"{own}:{{port}}", endpoint)
        )
        assert answer.status == 200
        assert endpoint.ask("GET", "/v1/models", allowed).status == 200


@pytest.mark.parametrize("origin", ORIGINS)
def test_h2_pages_of_other_sites_are_refused(
    endpoint: Endpoint, driver: FakeDriver, origin: str
) -> None:
    header = f"Origin: {of_port(origin, endpoint)}"

    answers = [
        endpoint.post(CHAT, header),
        endpoint.ask("GET", "/v1/models", header),
        endpoint.ask(
            "OPTIONS",
            CHAT_PATH,
            header,
            "Access-Control-Request-Method: POST",
            "Access-Control-Request-Headers: content-type",
        ),
    ]

    assert [(answer.status, answer.code) for answer in answers] == [(403, "origin_refused")] * 3
    for answer in answers:
        assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert not driver.calls


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""],
)
def test_h2_a_body_that_needs_no_preflight_is_refused(
    endpoint: Endpoint, driver: FakeDriver, content_type: str
) -> None:
    body = json.dumps(CHAT).encode()
    headers = [f"Content-Type: {content_type}"] if content_type else []

    answer = endpoint.ask("POST", CHAT_PATH, *headers, body=body)
    smuggled = endpoint.ask("POST", CHAT_PATH, "Content-Type: text/plain; application/json")

    assert (answer.status, smuggled.status) == (415, 415)
    assert not driver.calls


def test_h2_a_preflight_of_an_allowed_site_is_answered_without_a_key() -> None:
    with running(FakeDriver(), api_key=KEY, origins=frozenset({SITE})) as url:
        answer = Endpoint(url).ask(
            "OPTIONS",
            CHAT_PATH,
            f"Origin: {SITE}",
            "Access-Control-Request-Method: POST",
            "Access-Control-Request-Headers: authorization,content-type,x-evil,x-stainless-os",
            "Access-Control-Request-Private-Network: true",
        )

    assert (answer.status, answer.body) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == SITE
    assert answer.headers["access-control-allow-methods"] == "GET, POST"
    allowed = answer.headers["access-control-allow-headers"]
    assert allowed == "authorization, content-type, x-stainless-os"
    assert answer.headers["access-control-allow-private-network"] == "true"
    assert answer.headers["vary"] == "Origin"
    assert "access-control-allow-credentials" not in answer.headers


def test_h2_an_allowed_site_reads_answers_and_refusals_and_no_other_does(
    endpoint: Endpoint,
) -> None:
    ours = [endpoint.post(CHAT, f"Origin: {SITE}"), endpoint.post(b"{", f"Origin: {SITE}")]
    own = endpoint.post(CHAT, f"Origin: http://{endpoint.netloc}")
    nobody = endpoint.post(CHAT)

    assert [answer.status for answer in (*ours, own, nobody)] == [200, 400, 200, 200]
    assert {answer.headers["access-control-allow-origin"] for answer in ours} == {SITE}
    for answer in (own, nobody):
        assert "access-control-allow-origin" not in answer.headers


def test_h2_an_options_request_that_is_no_preflight_is_no_way_in(endpoint: Endpoint) -> None:
    assert endpoint.ask("OPTIONS", CHAT_PATH, f"Origin: {SITE}").status in (204, 405)
    assert endpoint.ask("OPTIONS", CHAT_PATH, "Access-Control-Request-Method: POST").status in (
        204,
        405,
    )
