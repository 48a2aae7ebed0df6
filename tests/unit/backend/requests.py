"""Requests as an administrator signs them, and what came of them."""

from __future__ import annotations

import sqlalchemy as sa

from pals.backend import schema
from pals.backend.database import reading
from pals.backend.service import BackendService, SignedRequest
from pals.swarm.identity import Identity
from pals.swarm.invite import Invite
from pals.swarm.requests import sign_request
from pals.swarm.roster import Roster, verify_chain
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


class Clock:
    """A wall clock that the test moves."""

    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


def invited(
    service: BackendService, chain: Chain, *, max_uses: int = 1, not_after: int = 0
) -> Invite:
    """Store the certificate of a new invite."""
    invite = chain.invite()
    certificate = chain.certificate(invite, max_uses=max_uses, not_after=not_after)
    append(service, chain, certificate)
    return invite


def uses(service: BackendService) -> list[int]:
    """Return how often each invite was used."""
    with reading(service._engine) as connection:
        return list(connection.scalars(sa.select(schema.invites.c.used)))


def roster(service: BackendService, chain: Chain) -> Roster:
    """Return the roster that members make of the stored chain."""
    return verify_chain(chain.swarm_id, service.entries(chain.swarm_id).entries or ())


def members(service: BackendService, chain: Chain) -> frozenset[str]:
    """Return who is a member by the stored chain."""
    return roster(service, chain).members
