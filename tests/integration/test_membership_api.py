"""The membership service over HTTP, as a stranger and as a member see it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from pals.api.membership import MAX_MESSAGE_BYTES, RateLimits
from pals.backend.database import sqlite_url
from pals.backend.service import BackendService
from pals.errors import StorageFailed
from tests.integration.backends import running_backend
from tests.unit.swarm.chains import Chain, identity

P = identity(3)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[BackendService]:
    service = BackendService(sqlite_url(tmp_path / "backend.db"))
    yield service
    service.close()


@pytest.fixture
def http(service: BackendService) -> Iterator[httpx.Client]:
    with running_backend(service) as url, httpx.Client(base_url=url) as client:
        yield client


@pytest.fixture
def chain(service: BackendService) -> Chain:
    chain = Chain()
    service.create_swarm(chain.genesis)
    return chain


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_health_says_nothing_about_swarms(http: httpx.Client) -> None:
    response = http.get("/healthz")
    assert response.status_code == 200
    assert response.json() == {"status": "ok"}


def test_swarm_is_created_and_joined(http: httpx.Client) -> None:
    chain = Chain()
    assert http.post("/v1/swarms", json={"record": b64(chain.genesis)}).status_code == 201
    base = f"/v1/swarms/{chain.swarm_id.hex()}"
    invite = chain.invite()
    certificate = b64(chain.certificate(invite))
    assert http.post(f"{base}/records", json={"record": certificate}).status_code == 200
    join = chain.join(invite.signing_key, P)
    body = {"auth": b64(invite.auth), "join": b64(join)}
    assert http.post(f"{base}/redeem", json=body).status_code == 200
    assert len(http.get(f"{base}/records").json()["entries"]) == 3


def test_unchanged_list_is_answered_with_304(
    http: httpx.Client, chain: Chain, service: BackendService
) -> None:
    path = f"/v1/swarms/{chain.swarm_id.hex()}/records"
    etag = http.get(path).headers["etag"]
    again = http.get(path, headers={"if-none-match": etag})
    assert (again.status_code, again.content) == (304, b"")
    service.append_record(chain.swarm_id, chain.certificate(chain.invite()))
    assert http.get(path, headers={"if-none-match": etag}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"record": 1}',
        b'{"record": "%%%"}',
        b'{"record": "AAAA", "extra": 1}',
        b'{"record": "\xff"}',
        b"[" * 60 + b"]" * 60,
    ],
)
def test_malformed_body_is_refused(http: httpx.Client, body: bytes) -> None:
    response = http.post("/v1/swarms", content=body, headers={"content-type": "application/json"})
    assert code(response) == (400, "invalid_value")


def test_invalid_record_is_refused(http: httpx.Client, chain: Chain) -> None:
    evil = b64(chain.certificate(chain.invite(), signer=identity(666)))
    path = f"/v1/swarms/{chain.swarm_id.hex()}/records"
    assert code(http.post(path, json={"record": evil})) == (400, "PALS-RECORD-INVALID")


def test_oversized_body_is_refused(http: httpx.Client) -> None:
    response = http.post("/v1/swarms", json={"record": "A" * MAX_MESSAGE_BYTES})
    assert code(response) == (413, "body_too_large")


@pytest.mark.parametrize("swarm", ["00" * 32, "zz", "00", "%00"])
def test_unknown_swarm_is_not_found(http: httpx.Client, swarm: str) -> None:
    assert code(http.get(f"/v1/swarms/{swarm}/records")) == (404, "PALS-SWARM-UNKNOWN")
    assert code(http.get(f"/v1/swarms/{swarm}/hints")) == (404, "PALS-SWARM-UNKNOWN")


def test_there_is_nothing_else(http: httpx.Client) -> None:
    for path in ("/", "/schema", "/docs", "/v1/swarms/x"):
        assert code(http.get(path)) == (404, "unknown_url")
    assert code(http.delete("/v1/swarms")) == (405, "method_not_allowed")


def test_web_pages_are_refused(http: httpx.Client, chain: Chain) -> None:
    body = {"record": b64(chain.genesis)}
    foreign = http.post("/v1/swarms", json=body, headers={"origin": "https://evil.example"})
    assert foreign.status_code == 403
    assert http.get("/healthz", headers={"host": "evil.example"}).status_code == 421
    simple = http.post("/v1/swarms", content="{}", headers={"content-type": "text/plain"})
    assert simple.status_code == 415


def test_refusals_of_an_invite_look_alike(
    http: httpx.Client, chain: Chain, service: BackendService
) -> None:
    spent, unknown = chain.invite(), chain.invite()
    service.append_record(chain.swarm_id, chain.certificate(spent))
    service.redeem(chain.swarm_id, spent.auth, chain.join(spent.signing_key, P))
    answers: list[tuple[int, bytes]] = []
    for invite in (spent, unknown):
        join = chain.join(invite.signing_key, identity(9))
        body = {"auth": b64(invite.auth), "join": b64(join)}
        response = http.post(f"/v1/swarms/{chain.swarm_id.hex()}/redeem", json=body)
        answers.append((response.status_code, response.content))
    assert answers[0] == answers[1]
    assert answers[0][0] == 403


def test_guessing_is_slowed_down(service: BackendService, chain: Chain) -> None:
    invite = chain.invite()
    body = {"auth": b64(invite.auth), "join": b64(chain.join(invite.signing_key, P))}
    limits = RateLimits(redeems=3, swarms=1)
    with running_backend(service, limits=limits) as url, httpx.Client(base_url=url) as http:
        path = f"/v1/swarms/{chain.swarm_id.hex()}/redeem"
        headers = [{"x-forwarded-for": f"10.0.0.{i}"} for i in range(4)]
        statuses = [http.post(path, json=body, headers=h).status_code for h in headers]
        assert statuses == [403, 403, 403, 429]
        genesis = {"record": b64(chain.genesis)}
        assert [http.post("/v1/swarms", json=genesis).status_code for _ in range(2)] == [201, 429]


def test_failing_database_is_a_503_without_details(
    http: httpx.Client,
    chain: Chain,
    service: BackendService,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise StorageFailed(problem="disk I/O error")

    monkeypatch.setattr(service, "entries", fail)
    response = http.get(f"/v1/swarms/{chain.swarm_id.hex()}/records")
    assert code(response) == (503, "PALS-BACKEND-STORAGE")
    monkeypatch.setattr(service, "entries", lambda *_: 1 / 0)
    response = http.get(f"/v1/swarms/{chain.swarm_id.hex()}/records")
    assert code(response) == (500, "PALS-INTERNAL")
    assert b"division" not in response.content
