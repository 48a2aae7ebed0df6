"""M6 to M10: invites that are guessed, used too often or stolen, and what a backend keeps."""

from __future__ import annotations

import base64
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from pals.backend.database import sqlite_url
from pals.backend.limiter import BackendLimiter
from pals.backend.service import BackendService
from pals.backend.transfer import back_up
from pals.errors import InvalidRecord, InviteRefused, TooManyAttempts
from pals.swarm.records import digest
from tests.integration.backends import running_backend
from tests.unit.backend.requests import Clock, append, invited, members, uses
from tests.unit.swarm.chains import NOW, SECRET, Chain, identity

P, Q = identity(3), identity(4)
GUESSES = 10_000
SWARM_ID = Chain().swarm_id


# --- M6: guessing, and asking what is wrong ---------------------------------------------


def test_m6_every_refusal_of_an_invite_is_the_same(
    service: BackendService, chain: Chain, wall_clock: Clock
) -> None:
    spent, expiring, closing = (
        invited(service, chain),
        invited(service, chain, not_after=NOW + 10),
        invited(service, chain, max_uses=5),
    )
    service.redeem(chain.swarm_id, spent.auth, chain.join(spent.signing_key, identity(7)))
    join = chain.join(closing.signing_key, P)
    service.redeem(chain.swarm_id, closing.auth, join)
    append(service, chain, chain.remove(P, joined=digest(join)))
    wall_clock.now += 11
    unknown, elsewhere = chain.invite(), Chain(operator=identity(8))
    attempts = [
        (chain.swarm_id, spent.auth, chain.join(spent.signing_key, Q)),
        (chain.swarm_id, expiring.auth, chain.join(expiring.signing_key, Q)),
        (chain.swarm_id, closing.auth, chain.join(closing.signing_key, Q)),
        (chain.swarm_id, closing.auth, join),
        (chain.swarm_id, unknown.auth, chain.join(unknown.signing_key, Q)),
        (chain.swarm_id, unknown.auth, chain.join(spent.signing_key, Q)),
        (elsewhere.swarm_id, spent.auth, elsewhere.join(spent.signing_key, Q)),
    ]
    texts: set[tuple[str, str]] = set()
    for swarm_id, auth, record in attempts:
        with pytest.raises(InviteRefused) as caught:
            service.redeem(swarm_id, auth, record)
        texts.add((str(caught.value), caught.value.hint))
    assert len(texts) == 1
    assert Q.peer_id not in members(service, chain)


def test_m6_the_same_statements_run_whatever_is_wrong_with_an_invite(
    service: BackendService, chain: Chain, wall_clock: Clock
) -> None:
    spent, expired, revoked = (
        invited(service, chain),
        invited(service, chain, not_after=NOW - 1),
        invited(service, chain),
    )
    service.redeem(chain.swarm_id, spent.auth, chain.join(spent.signing_key, P))
    append(service, chain, chain.revoke(revoked))
    statements: list[str] = []
    sa.event.listen(
        service._engine,
        "before_cursor_execute",
        lambda _c, _u, statement, *_: statements.append(statement),
    )
    seen: list[list[str]] = []
    for invite in (spent, expired, revoked, chain.invite()):
        statements.clear()
        with pytest.raises(InviteRefused):
            service.redeem(chain.swarm_id, invite.auth, chain.join(invite.signing_key, Q))
        seen.append(list(statements))
    assert seen[0]
    assert all(each == seen[0] for each in seen)


def test_m6_answers_over_http_are_the_same_bytes(tmp_path: Path) -> None:
    service = BackendService(sqlite_url(tmp_path / "backend.db"))
    chain = Chain()
    service.create_swarm(chain.genesis)
    now = time.time()
    spent, revoked, expired, unknown = (chain.invite() for _ in range(4))
    for invite, not_after in ((spent, 0), (revoked, 0), (expired, int(now) - 5)):
        append(service, chain, chain.certificate(invite, not_after=not_after), at=now)
    service.redeem(chain.swarm_id, spent.auth, chain.join(spent.signing_key, P))
    append(service, chain, chain.revoke(revoked), at=now)
    answers: set[tuple[int, bytes, tuple[str, ...]]] = set()
    with running_backend(service) as url, httpx.Client(base_url=url) as http:
        for invite in (spent, revoked, expired, unknown):
            join = chain.join(invite.signing_key, Q)
            fields = {"auth": b64(invite.auth), "join": b64(join)}
            response = http.post(f"/v1/swarms/{chain.swarm_id.hex()}/redeem", json=fields)
            answers.add((response.status_code, response.content, tuple(response.headers)))
    service.close()
    ((status, _, _),) = answers
    assert status == 403


def address(number: int) -> str:
    return f"10.{number >> 8 & 255}.{number & 255}.1"


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_m6_ten_thousand_guesses_are_throttled_from_one_address_and_from_many() -> None:
    for sources in (1, GUESSES):
        now = 0.0
        limiter = BackendLimiter(clock=lambda: now)  # noqa: B023 # called in this turn
        let_through = 0
        for number in range(GUESSES):
            now = 60.0 * number / GUESSES
            try:
                limiter.redeem(address(number % sources), SWARM_ID)
            except TooManyAttempts:
                continue
            let_through += 1
        assert let_through <= (10 if sources == 1 else 100)


# --- M7: more uses than allowed -------------------------------------------------------------


def test_m7_fifty_concurrent_redeems_admit_exactly_max_uses(
    service: BackendService, chain: Chain
) -> None:
    invite = invited(service, chain, max_uses=3)
    joins = [chain.join(invite.signing_key, identity(100 + i)) for i in range(50)]

    def attempt(join: bytes) -> bool:
        try:
            service.redeem(chain.swarm_id, invite.auth, join)
        except InviteRefused:
            return False
        return True

    with ThreadPoolExecutor(50) as pool:
        outcomes = list(pool.map(attempt, joins))
    assert outcomes.count(True) == 3
    assert len(members(service, chain)) == 1 + 3
    assert uses(service) == [3]


# --- M8: a lost reply ----------------------------------------------------------------------


def test_m8_a_redemption_whose_reply_was_lost_uses_the_invite_once(
    service: BackendService, chain: Chain
) -> None:
    invite = invited(service, chain, max_uses=1)
    join = chain.join(invite.signing_key, P)
    lost = service.redeem(chain.swarm_id, invite.auth, join)
    for _ in range(3):
        assert service.redeem(chain.swarm_id, invite.auth, join) == lost
    assert uses(service) == [1]
    assert members(service, chain) == {chain.founder.peer_id, P.peer_id}


# --- M9: somebody else's identity -------------------------------------------------------------


def test_m9_an_identity_that_did_not_sign_is_not_registered(
    service: BackendService, chain: Chain
) -> None:
    """Whoever holds an invite names a victim's peer id, in every way it can."""
    invite, other = invited(service, chain, max_uses=5), Chain(operator=identity(8))
    signed_elsewhere = other.join(other.invite().signing_key, P)
    for join in (
        chain.join(invite.signing_key, P, peer_signer=Q),
        chain.join(invite.signing_key, P, peer_signer=invite.signing_key),
        chain.join(Q, P, invite_signer=invite.signing_key),
        signed_elsewhere,
    ):
        with pytest.raises((InvalidRecord, InviteRefused)):
            service.redeem(chain.swarm_id, invite.auth, join)
    assert members(service, chain) == {chain.founder.peer_id}
    assert uses(service) == [0]


# --- M10: what is at rest ----------------------------------------------------------------------


def test_m10_database_journal_and_backup_hold_no_token_secret_or_key(tmp_path: Path) -> None:
    folder = tmp_path / "backend"
    service = BackendService(sqlite_url(folder / "backend.db"))
    chain = Chain()
    service.create_swarm(chain.genesis)
    invite = chain.invite()
    append(service, chain, chain.certificate(invite, max_uses=2), at=time.time())
    service.redeem(chain.swarm_id, invite.auth, chain.join(invite.signing_key, P))
    back_up(sqlite_url(folder / "backend.db"), folder / "copy.db")
    files = sorted(folder.iterdir())
    stored = b"".join(file.read_bytes() for file in files)
    service.close()
    assert {".db", ".db-wal"} <= {"".join(file.suffixes) for file in files}
    assert invite.redeem_hash in stored
    keys = (invite.signing_key, chain.operator, chain.founder, P)
    secrets = [invite.auth, SECRET.reveal(), *(key.reveal_seed() for key in keys)]
    halves = [half.encode() for half in invite.to_text().removeprefix("pp_inv_").split(".")]
    forms = [f(s) for s in secrets for f in (bytes, bytes_hex, base64.b64encode)] + halves
    assert not [form for form in forms if form in stored]


def bytes_hex(data: bytes) -> bytes:
    return data.hex().encode()
