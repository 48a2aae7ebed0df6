"""Requests as an administrator signs them."""

from __future__ import annotations

from pals.backend.service import BackendService, SignedRequest
from pals.swarm.identity import Identity
from pals.swarm.requests import sign_request
from tests.unit.swarm.chains import NOW, Chain


def signed(
    chain: Chain, record: bytes, *, signer: Identity | None = None, at: float = NOW
) -> SignedRequest:
    """Return the request of the operator, or of another, to store a record."""
    method, path = "POST", f"/v1/swarms/{chain.swarm_id.hex()}/records"
    authorization = sign_request(
        signer or chain.operator, method=method, path=path, body=record, at=int(at)
    )
    return SignedRequest(method=method, path=path, body=record, authorization=authorization)


def append(service: BackendService, chain: Chain, record: bytes, *, at: float = NOW) -> bytes:
    """Store a record as its operator does, and return its entry."""
    return service.append_record(chain.swarm_id, record, signed(chain, record, at=at))
