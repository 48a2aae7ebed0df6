from __future__ import annotations

import pytest

from pals.errors import InvalidRecord
from pals.swarm.requests import WINDOW_S, open_request, sign_request
from tests.unit.swarm.chains import NOW, identity

OPERATOR = identity(1)


def proof(*, at: int = NOW) -> str:
    return sign_request(OPERATOR, method="POST", path="/v1/swarms/ab/records", body=b"{}", at=at)


def test_proof_says_who_asks() -> None:
    opened = open_request(
        proof(), method="POST", path="/v1/swarms/ab/records", body=b"{}", now_unix=NOW + WINDOW_S
    )
    assert opened.signer == OPERATOR.public_key
    assert opened.at == NOW


def test_each_proof_has_its_own_nonce() -> None:
    assert proof() != proof()


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/v1/swarms/ab/records", b"{}"),
        ("POST", "/v1/swarms/ac/records", b"{}"),
        ("POST", "/v1/swarms/ab/records", b"{ }"),
    ],
    ids=["method", "path", "body"],
)
def test_proof_holds_for_no_other_request(method: str, path: str, body: bytes) -> None:
    with pytest.raises(InvalidRecord, match="not signed"):
        open_request(proof(), method=method, path=path, body=body, now_unix=NOW)


@pytest.mark.parametrize("late_s", [-WINDOW_S - 1, WINDOW_S + 1])
def test_proof_holds_for_minutes_only(late_s: int) -> None:
    with pytest.raises(InvalidRecord, match="301 s"):
        open_request(
            proof(), method="POST", path="/v1/swarms/ab/records", body=b"{}", now_unix=NOW + late_s
        )


@pytest.mark.parametrize("value", ["", "%%%", "AAAA", "A" * 100_000])
def test_what_is_no_proof_is_refused(value: str) -> None:
    with pytest.raises(InvalidRecord):
        open_request(value, method="POST", path="/v1/swarms/ab/records", body=b"{}", now_unix=NOW)
