"""The membership service over HTTP, as a stranger and as a member see it."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from pals.api.membership import FRESHNESS_HEADER, MAX_MESSAGE_BYTES
from pals.backend.database import sqlite_url
from pals.backend.limiter import RateLimits
from pals.backend.service import BackendService
from pals.errors import StorageFailed
from pals.swarm.freshness import open_freshness
from pals.swarm.identity import Identity
from pals.swarm.requests import HEADER, sign_request
from pals.swarm.roster import verify_chain
from tests.integration.backends import running_backend
from tests.unit.backend.requests import append
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


def post_signed(
    http: httpx.Client, chain: Chain, record: bytes, *, signer: Identity | None = None
) -> httpx.Response:
    """Post a record as an administrator's command does."""
    path = f"/v1/swarms/{chain.swarm_id.hex()}/records"
    body = json.dumps({"record": b64(record)}).encode()
    proof = sign_request(
        signer or chain.operator, method="POST", path=path, body=body, at=int(time.time())
    )
    headers = {"content-type": "application/json", HEADER: proof}
    return http.post(path, content=body, headers=headers)


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
    assert post_signed(http, chain, chain.certificate(invite)).status_code == 200
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
    append(service, chain, chain.certificate(chain.invite()), at=time.time())
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
    evil = chain.certificate(chain.invite(), signer=identity(666))
    assert code(post_signed(http, chain, evil)) == (400, "PALS-RECORD-INVALID")


def test_administrators_sign_their_requests(http: httpx.Client, chain: Chain) -> None:
    record = chain.certificate(chain.invite())
    path = f"/v1/swarms/{chain.swarm_id.hex()}/records"
    stolen = http.post(path, json={"record": b64(record)})
    assert code(stolen) == (400, "PALS-RECORD-INVALID")
    accepted = post_signed(http, chain, record)
    assert accepted.status_code == 200
    replayed = http.post(path, content=accepted.request.content, headers=accepted.request.headers)
    assert code(replayed) == (400, "PALS-RECORD-INVALID")
    assert "made before" in replayed.json()["error"]["message"]


def test_every_list_comes_with_the_word_of_an_appointed_backend(
    http: httpx.Client, chain: Chain
) -> None:
    path = f"/v1/swarms/{chain.swarm_id.hex()}/records"
    assert FRESHNESS_HEADER not in http.get(path).headers
    key = base64.b64decode(http.get("/v1/backend").json()["key"])
    assert post_signed(http, chain, chain.appoint(key, "backend")).status_code == 200
    whole = http.get(path)
    unchanged = http.get(path, headers={"if-none-match": whole.headers["etag"]})
    assert unchanged.status_code == 304
    entries = [base64.b64decode(entry) for entry in whole.json()["entries"]]
    roster = verify_chain(chain.swarm_id, entries)
    for response in (whole, unchanged):
        word = base64.urlsafe_b64decode(response.headers[FRESHNESS_HEADER])
        assert open_freshness(word, roster, now_unix=time.time()).signer == key


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
    spent, expired, revoked, unknown = (chain.invite() for _ in range(4))
    now = int(time.time())
    for record in (
        chain.certificate(spent),
        chain.certificate(expired, not_after=now - 1),
        chain.certificate(revoked),
        chain.revoke(revoked),
    ):
        append(service, chain, record, at=now)
    service.redeem(chain.swarm_id, spent.auth, chain.join(spent.signing_key, P))
    answers: set[tuple[int, bytes, tuple[str, ...]]] = set()
    for invite in (spent, expired, revoked, unknown):
        join = chain.join(invite.signing_key, identity(9))
        body = {"auth": b64(invite.auth), "join": b64(join)}
        response = http.post(f"/v1/swarms/{chain.swarm_id.hex()}/redeem", json=body)
        answers.add((response.status_code, response.content, tuple(sorted(response.headers))))
    assert len(answers) == 1
    assert answers.pop()[0] == 403


def test_guessing_is_slowed_down(service: BackendService, chain: Chain) -> None:
    invite = chain.invite()
    body = {"auth": b64(invite.auth), "join": b64(chain.join(invite.signing_key, P))}
    limits = RateLimits(redeems=3, swarms=1, reads=1, writes=1)
    with running_backend(service, limits=limits) as url, httpx.Client(base_url=url) as http:
        path = f"/v1/swarms/{chain.swarm_id.hex()}"
        headers = [{"x-forwarded-for": f"10.0.0.{i}"} for i in range(4)]
        statuses = [http.post(f"{path}/redeem", json=body, headers=h).status_code for h in headers]
        assert statuses == [403, 403, 403, 429]
        genesis = {"record": b64(chain.genesis)}
        assert [http.post("/v1/swarms", json=genesis).status_code for _ in range(2)] == [201, 429]
        assert [http.get(f"{path}/hints").status_code for _ in range(2)] == [200, 429]
        assert http.get(f"{path}/records").status_code == 429
        hint = {"hint": b64(b"none")}
        assert [http.put(f"{path}/hints", json=hint).status_code for _ in range(2)] == [400, 429]


def test_swarm_has_a_limit_of_its_own_behind_any_proxy(
    service: BackendService, chain: Chain
) -> None:
    invite = chain.invite()
    body = {"auth": b64(invite.auth), "join": b64(chain.join(invite.signing_key, P))}
    limits, proxies = RateLimits(redeems=2, redeems_of_swarm=5), frozenset({"127.0.0.1"})
    with (
        running_backend(service, limits=limits, proxies=proxies) as url,
        httpx.Client(base_url=url) as http,
    ):

        def redeem(forwarded: str, swarm: str = chain.swarm_id.hex()) -> int:
            headers = {"x-forwarded-for": forwarded}
            return http.post(f"/v1/swarms/{swarm}/redeem", json=body, headers=headers).status_code

        # Only what the proxy itself added counts, not what a client said before it.
        assert [redeem(f"10.9.9.{i}, 10.0.0.1") for i in range(3)] == [403, 403, 429]
        assert [redeem(f"10.0.1.{i}") for i in range(4)] == [403, 403, 403, 429]
        assert redeem("10.0.2.1", "ab" * 32) == 400


def test_failing_database_is_a_503_without_details(
    http: httpx.Client,
    chain: Chain,
    service: BackendService,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise StorageFailed(problem="disk I/O error")

    monkeypatch.setattr(service, "entries", fail)
    monkeypatch.setattr(service, "check", fail)
    for path in (f"/v1/swarms/{chain.swarm_id.hex()}/records", "/healthz"):
        response = http.get(path)
        assert code(response) == (503, "PALS-BACKEND-STORAGE")
        assert b"I/O" not in response.content
    monkeypatch.setattr(service, "entries", lambda *_: 1 / 0)
    response = http.get(f"/v1/swarms/{chain.swarm_id.hex()}/records")
    assert code(response) == (500, "PALS-INTERNAL")
    assert b"division" not in response.content


def test_metrics_and_log_tell_what_happens_but_not_to_whom(
    http: httpx.Client, chain: Chain, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="pals")
    invite, swarm = chain.invite(), chain.swarm_id.hex()
    join = chain.join(invite.signing_key, P)
    body = {"auth": b64(invite.auth), "join": b64(join)}
    http.post(f"/v1/swarms/{swarm}/redeem?canary=query", json=body)
    http.get(f"/v1/swarms/{swarm}/records?token=canary")
    http.get("/v1/canary")
    http.get("/healthz", headers={"host": "evil.example"})
    http.request("CANARY", "/healthz")
    metrics = http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    counted = [line for line in metrics.text.splitlines() if "_count{" in line]
    labels = {line.partition("{")[2].rpartition("}")[0] for line in counted}
    assert labels == {
        f'route="{route}",status="{status}",transport="http"'
        for route, status in (
            ("POST /v1/swarms/{swarm}/redeem", 403),
            ("GET /v1/swarms/{swarm}/records", 200),
            ("GET none", 404),
            ("GET none", 421),
            ("other none", 405),
        )
    }
    requests = [getattr(record, "fields", {}) for record in caplog.records]
    shown = {fields.get("swarm") for fields in requests}
    assert shown == {swarm[:8], None}
    everything = f"{metrics.text} {caplog.text} {requests}"
    assert not [canary for canary in ("canary", "evil", swarm, P.peer_id) if canary in everything]
