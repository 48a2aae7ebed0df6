"""`pals backend` and PostgreSQL killed with -9, between operations and in the middle of them."""

from __future__ import annotations

import base64
import itertools
import json
import random
import signal
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from pals.backend.database import sqlite_url
from pals.backend.transfer import back_up
from pals.config import DATABASE_URL_VARIABLE
from pals.swarm.identity import Identity
from pals.swarm.invite import Invite
from pals.swarm.records import Join, Revoke, decode_entry, decode_record
from pals.swarm.requests import HEADER, sign_request
from pals.swarm.roster import verify_chain
from tests.integration.backend_child import Child
from tests.integration.processes import Pals, Running
from tests.unit.backend.membership_machine import play
from tests.unit.swarm.chains import SECRET, Chain, identity

if TYPE_CHECKING:
    from tests.postgres import PostgresServer

PEERS = tuple(identity(20 + number) for number in range(8))
SEED = 5
TLS = ssl.create_default_context()
"""Read once: httpx would read every authority anew for each request, of plain HTTP too."""


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return sqlite_url(tmp_path / "data" / "backend.db")
    postgres: PostgresServer = request.getfixturevalue("postgres")
    return postgres.new_url()


@dataclass
class Backend:
    """A `pals backend` that is started again on the same database after each kill."""

    pals: Pals
    stack: ExitStack
    database_url: str
    logs: list[str] = field(default_factory=list[str])

    def start(self) -> None:
        command = ("backend", "--port", "0", "--json", "--log-format", "json")
        proxy = ("--trusted-proxy", "127.0.0.1")
        variables = {DATABASE_URL_VARIABLE: self.database_url}
        self.running: Running = self.stack.enter_context(
            self.pals.start(*command, *proxy, **variables)
        )
        self.url = str(self.running.wait_for_event("ready")["url"])

    def kill(self) -> None:
        self.running.signal(signal.SIGKILL)
        self.logs.append(self.running.wait().err)


@pytest.fixture
def backend(tmp_path: Path, database_url: str) -> Iterator[Backend]:
    with ExitStack() as stack:
        pals = Pals({"PALS_CONFIG_DIR": str(tmp_path / "profile")})
        backend = Backend(pals=pals, stack=stack, database_url=database_url)
        backend.start()
        yield backend


class Client:
    """One of many callers, each with an address of its own behind the proxy."""

    _numbers = itertools.count()

    def __init__(self, backend: Backend, chain: Chain) -> None:
        self._backend = backend
        self._chain = chain
        self._path = f"/v1/swarms/{chain.swarm_id.hex()}"

    def create(self) -> None:
        assert self._post("/v1/swarms", {"record": self._chain.genesis}) is not None

    def append(self, record: bytes) -> bytes | None:
        return self._post(f"{self._path}/records", {"record": record}, signer=self._chain.operator)

    def redeem(self, invite: Invite, peer: Identity) -> bytes | None:
        join = self._chain.join(invite.signing_key, peer)
        return self._post(f"{self._path}/redeem", {"auth": invite.auth, "join": join})

    def entries(self) -> tuple[bytes, ...] | None:
        """Return the list, or None when no proper answer came."""
        answer = self._request("GET", f"{self._path}/records")
        if answer is None:
            return None
        return tuple(base64.b64decode(entry) for entry in answer["entries"])

    def _post(
        self, path: str, fields: dict[str, bytes], *, signer: Identity | None = None
    ) -> bytes | None:
        """Return the entry that was acknowledged, or None."""
        answer = self._request("POST", path, fields, signer)
        return None if answer is None else base64.b64decode(answer["entry"])

    def _request(
        self,
        method: str,
        path: str,
        fields: dict[str, bytes] | None = None,
        signer: Identity | None = None,
    ) -> dict[str, str] | None:
        number = next(self._numbers)
        headers = {"x-forwarded-for": f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"}
        texts = {name: base64.b64encode(value).decode() for name, value in (fields or {}).items()}
        body = json.dumps(texts).encode() if fields else b""
        if fields:
            headers["content-type"] = "application/json"
        if signer is not None:
            at = int(time.time())
            headers[HEADER] = sign_request(signer, method=method, path=path, body=body, at=at)
        try:
            url = self._backend.url + path
            response = httpx.request(
                method, url, content=body, headers=headers, timeout=20, verify=TLS
            )
        except httpx.TransportError:
            return None
        return response.json() if response.is_success else None


def forms(secret: bytes) -> list[bytes]:
    """Return how a secret could stand in a file."""
    standard, url = base64.b64encode(secret), base64.urlsafe_b64encode(secret)
    return [secret, secret.hex().encode(), standard.rstrip(b"="), url.rstrip(b"=")]


def canaries(chain: Chain, invite: Invite) -> list[bytes]:
    secrets = [invite.auth, SECRET.reveal(), invite.signing_key.reveal_seed()]
    secrets += [key.reveal_seed() for key in (chain.operator, chain.founder, *PEERS)]
    texts = [half.encode() for half in invite.to_text().removeprefix("pp_inv_").split(".")]
    return [form for secret in secrets for form in forms(secret)] + texts


@pytest.mark.timeout(120)
def test_killed_backend_keeps_what_it_acknowledged_and_no_secret(
    backend: Backend, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    chain = Chain()
    client, invite = Client(backend, chain), chain.invite()
    client.create()
    assert client.append(chain.certificate(invite, max_uses=3)) is not None
    acknowledged: list[bytes] = []
    some = threading.Event()

    def redeem(peer: Identity) -> None:
        entry = client.redeem(invite, peer)
        if entry is not None:
            acknowledged.append(entry)
            some.set()

    with ThreadPoolExecutor(len(PEERS)) as pool:
        redemptions = [pool.submit(redeem, peer) for peer in PEERS]
        assert some.wait(60)
        backend.kill()
    for redemption in redemptions:
        redemption.result()
    backend.start()
    # A lost reply is asked for again; the invite is not used again by that.
    admitted = [peer for peer in PEERS if client.redeem(invite, peer) is not None]
    entries = client.entries() or ()
    assert set(acknowledged) <= set(entries)
    assert len(admitted) == 3
    roster = verify_chain(chain.swarm_id, entries)
    assert roster.members == {chain.founder.peer_id, *(peer.peer_id for peer in admitted)}
    metrics = httpx.get(f"{backend.url}/metrics").content
    assert back_up(backend.database_url, tmp_path / "copy.db").swarms == 1
    backend.kill()
    folders = [tmp_path]
    if "postgres" in request.fixturenames:
        folders.append(request.getfixturevalue("postgres").data)
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    stored = b"".join(file.read_bytes() for file in files)
    assert invite.redeem_hash in stored
    assert any("/redeem" in log for log in backend.logs)
    everything = stored + metrics + "".join(backend.logs).encode()
    assert not [canary for canary in canaries(chain, invite) if canary in everything]


@dataclass
class History:
    """What the clients saw; the invariants are checked on it when everything is over."""

    entries: list[bytes] = field(default_factory=list[bytes])
    lists: list[list[tuple[bytes, ...]]] = field(default_factory=list[list[tuple[bytes, ...]]])


def play_many(backend: Backend, chain: Chain, kill: Callable[[], None], *, kills: int) -> History:
    """Let eight clients do what they like while something is killed again and again."""
    history, over = History(), threading.Event()
    invites = [chain.invite() for _ in range(6)]
    founder = Client(backend, chain)
    founder.create()
    for invite in invites:
        assert founder.append(chain.certificate(invite, max_uses=2)) is not None

    def act(number: int) -> list[tuple[bytes, ...]]:
        chance, client = random.Random(SEED + number), Client(backend, chain)
        seen: list[tuple[bytes, ...]] = []
        while not over.is_set():
            invite, peer = chance.choice(invites), chance.choice(PEERS)
            match chance.choice(["redeem", "redeem", "read", "read", "revoke"]):
                case "redeem":
                    entry = client.redeem(invite, peer)
                case "revoke" if chance.random() < 0.15:
                    entry = client.append(chain.revoke(invite))
                case _:
                    entry = None
                    listed = client.entries()
                    seen += [listed] if listed is not None else []
            history.entries += [entry] if entry is not None else []
        return seen

    with ThreadPoolExecutor(len(PEERS)) as pool:
        clients = [pool.submit(act, number) for number in range(len(PEERS))]
        try:
            for _ in range(kills):
                before = len(history.entries) + 2
                deadline = time.monotonic() + 2
                while len(history.entries) < before and time.monotonic() < deadline:
                    time.sleep(0.01)
                kill()
        finally:
            over.set()
        history.lists = [client.result() for client in clients]
    return history


def check(history: History, chain: Chain, final: tuple[bytes, ...]) -> None:
    verify_chain(chain.swarm_id, final)  # I5, I6
    assert set(history.entries) <= set(final)  # I2
    for seen in history.lists:
        assert seen
        for earlier, later in itertools.pairwise([*seen, final]):
            assert later[: len(earlier)] == earlier  # I7
    uses: dict[bytes, int] = {}
    revoked: set[bytes] = set()
    for entry in final:
        match decode_record(decode_entry(entry).record):
            case Join(invite=invite):
                uses[invite] = uses.get(invite, 0) + 1
                assert invite not in revoked  # I3
                assert uses[invite] <= 2  # I1
            case Revoke(invite=invite):
                revoked.add(invite)
            case _:
                pass
    assert sum(uses.values()) >= 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_history_of_many_clients_holds_while_the_backend_is_killed(backend: Backend) -> None:
    chain = Chain()

    def kill() -> None:
        backend.kill()
        backend.start()

    history = play_many(backend, chain, kill, kills=6)
    check(history, chain, Client(backend, chain).entries() or ())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_history_of_many_clients_holds_while_postgres_is_killed(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        pals = Pals({"PALS_CONFIG_DIR": str(tmp_path / "profile")})
        backend = Backend(pals=pals, stack=stack, database_url=postgres.new_url())
        backend.start()
        chain = Chain()

        def kill() -> None:
            postgres.kill()
            postgres.start()

        history = play_many(backend, chain, kill, kills=10)
        check(history, chain, Client(backend, chain).entries() or ())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_membership_holds_while_the_backend_is_killed(database_url: str) -> None:
    child = Child(database_url)
    play(child, games=4, steps=20)
    child.close()
