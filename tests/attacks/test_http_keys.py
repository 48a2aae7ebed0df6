"""H3 and H4: ways round the key of an endpoint."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pals.api.key_file import KeyFile, create_key, revoke_key
from tests.attacks.raw_http import CHAT, CHAT_PATH, Endpoint
from tests.fakes import FakeDriver
from tests.integration.api.servers import running

API = Path(__file__).parents[2] / "pals" / "api"
SECRET = re.compile(r"(api_?)?key|digest|secret|token|bearer|authorization|password", re.IGNORECASE)
KEY = "a key of enough length"
ALLOWED = f"Authorization: Bearer {KEY}"
WORDS = (b"test/tiny", b"peer-a")


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with running(FakeDriver(), api_key=KEY) as url:
        yield Endpoint(url)


def comparisons_of_secrets(source: str) -> list[str]:
    """Return what compares something called like a secret in a time that tells of it."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            plain = any(isinstance(o, ast.Eq | ast.NotEq | ast.In | ast.NotIn) for o in node.ops)
            sides = [node.left, *node.comparators]
            if plain and any(SECRET.fullmatch(last_name(side)) for side in sides):
                found.append(ast.unparse(node))
    return found


def last_name(node: ast.AST) -> str:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Call(func=function):
            return last_name(function)
        case _:
            return ""


def test_h3_no_key_is_compared_in_a_time_that_tells_of_it() -> None:
    sources = {path: path.read_text() for path in API.rglob("*.py")}

    assert {path: comparisons_of_secrets(text) for path, text in sources.items()} == {
        path: [] for path in sources
    }
    assert "compare_digest" in (API / "keys.py").read_text()


@pytest.mark.parametrize(
    "source", ["key == known", "known.digest != digest", "a.api_key in keys", "digest() == b"]
)
def test_h3_the_scan_finds_what_it_looks_for(source: str) -> None:
    assert comparisons_of_secrets(source)


@pytest.mark.parametrize(
    "header",
    [
        "X-Nothing: x",
        "Authorization: Bearer",
        "Authorization: Bearer ",
        f"Authorization: Bearer {KEY[:-1]}",
        f"Authorization: Bearer {KEY}x",
        f"Authorization: Bearer {KEY.upper()}",
        f"Authorization: Basic {KEY}",
        f"Authorization: {KEY}",
        f"X-Api-Key: {KEY}",
        f"Cookie: Authorization=Bearer {KEY}",
        f"Authorization: Bearer {KEY}, Bearer {KEY}",
        f"{ALLOWED}\r\n{ALLOWED}",
        f"{ALLOWED}\r\nAuthorization: Bearer other",
        "Authorization: Bearer \xff\xfe",
    ],
)
def test_h3_whatever_is_not_the_key_gets_the_same_answer(endpoint: Endpoint, header: str) -> None:
    answer = endpoint.ask("GET", "/v1/models", header)

    assert (answer.status, answer.code) == (401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.body == endpoint.ask("GET", "/v1/models").body
    assert endpoint.ask("GET", "/v1/models", ALLOWED).status == 200


@pytest.mark.parametrize(
    "path",
    [
        "//v1/models",
        "/v1/models/",
        "/v1//models",
        "/V1/models",
        "/%761/models",
        "/v1/models;/health",
        "/v1/models?/health",
        "/v1/models%3f/health",
        "/health/../v1/models",
        "/health/%2e%2e/v1/models",
        "/health%2f..%2fv1/models",
        "/healthz/v1/models",
        "/health%00/v1/models",
        "/v1/models%20",
        "/v1\\models",
        "/./v1/models",
        "/HEALTH",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_h4_no_spelling_of_a_path_is_open(endpoint: Endpoint, method: str, path: str) -> None:
    answer = endpoint.ask(method, path)

    assert answer.status == 401
    assert not [word for word in WORDS if word in answer.body]


@pytest.mark.parametrize("path", ["/%68ealth", "/health?x=/v1/models", "/health#/v1/models"])
def test_h4_what_is_open_says_that_it_answers_and_nothing_else(
    endpoint: Endpoint, path: str
) -> None:
    assert endpoint.ask("GET", path).body in (b'{"status":"ok"}', endpoint.ask("GET", "/x").body)


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "FOO"])
def test_h4_no_method_is_open(endpoint: Endpoint, method: str) -> None:
    assert endpoint.ask(method, "/v1/models").status == 401
    assert endpoint.ask("GET", "/v1/models", f"X-HTTP-Method-Override: {method}").status == 401
    answer = endpoint.ask(method, "/v1/models", ALLOWED, "Content-Type: application/json")
    assert answer.status == (204 if method == "OPTIONS" else 405)
    assert "GET" in answer.headers["allow"]


@pytest.mark.parametrize(
    "target", ["http://{host}/health", "http://{host}/v1/models", "*", "v1/models", "{host}"]
)
def test_h4_a_target_that_is_no_path_is_no_way_round(endpoint: Endpoint, target: str) -> None:
    answer = endpoint.ask("GET", target.replace("{host}", endpoint.netloc))

    assert answer.status in (400, 401)


@pytest.mark.parametrize(
    "path",
    [
        "/schema",
        "/schema/openapi.json",
        "/schema/swagger",
        "/docs",
        "/redoc",
        "/openapi.json",
        "/metrics",
        "/pals/chain",
        "/",
    ],
)
def test_h4_side_paths_need_the_key_and_there_are_no_docs(endpoint: Endpoint, path: str) -> None:
    assert endpoint.ask("GET", path).status == 401
    if path not in ("/metrics", "/pals/chain"):
        answer = endpoint.ask("GET", path, ALLOWED)
        assert (answer.status, answer.code) == (404, "unknown_url")


def test_h4_an_upgrade_is_no_way_round(endpoint: Endpoint) -> None:
    upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")

    assert endpoint.ask("GET", CHAT_PATH, *upgrade).status == 401


def test_h4_a_revoked_key_is_refused_by_a_server_that_runs(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    keys = {name: create_key(path, name, now=0) for name in ("laptop", "phone")}
    now_s = [0.0]
    with running(FakeDriver(), keys=KeyFile(path, clock=lambda: now_s[0])) as url:
        endpoint = Endpoint(url)

        def statuses() -> list[int]:
            allowed = [f"Authorization: Bearer {key}" for key in keys.values()]
            return [endpoint.post(CHAT, header).status for header in allowed]

        assert statuses() == [200, 200]
        revoke_key(path, "laptop")
        now_s[0] = 1.0
        assert statuses() == [401, 200]
        revoke_key(path, "phone")
        now_s[0] = 2.0
        assert statuses() == [401, 401]
        assert endpoint.post(CHAT).status == 401, "no key at all does not open it"
