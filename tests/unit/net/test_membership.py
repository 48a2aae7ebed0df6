"""The roster poller against a scripted backend, on a virtual clock."""

from __future__ import annotations

import random
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
import trio.testing

from pals.config import Profile
from pals.errors import BackendUnreachable, PalsError
from pals.net import membership
from pals.net.membership import (
    MembershipClient,
    cut_when_expired,
    load_roster,
    poll_roster,
    save_roster,
)
from pals.swarm.allowlist import AllowList
from pals.swarm.records import digest
from pals.swarm.roster import Roster
from pals.types import PeerId, SwarmId
from tests.unit.swarm.chains import Chain, identity

P, Q = identity(3), identity(4)
INTERVAL_S = 27.0

pytestmark = pytest.mark.trio


@dataclass
class Script(MembershipClient):
    """Answers with whatever the test sets, and notes when it was asked."""

    entries: list[bytes] | PalsError
    asked_at: list[float] = field(default_factory=list[float])
    etags: list[str | None] = field(default_factory=list[str | None])

    def __post_init__(self) -> None:
        super().__init__("http://127.0.0.1:1")

    async def fetch_records(
        self, swarm_id: SwarmId, *, etag: str | None = None
    ) -> tuple[tuple[bytes, ...], str] | None:
        self.asked_at.append(trio.current_time())
        self.etags.append(etag)
        if isinstance(self.entries, PalsError):
            raise self.entries
        tag = digest(self.entries[-1]).hex()
        return None if etag == tag else (tuple(self.entries), tag)


@dataclass
class Poll:
    """A running poller and all that it touches."""

    chain: Chain
    script: Script
    profile: Profile
    allow_list: AllowList = field(default_factory=AllowList)
    changes: list[tuple[frozenset[PeerId], frozenset[PeerId]]] = field(default_factory=list)

    def allows(self, peer: PeerId) -> bool:
        return self.allow_list.allows(peer, trio.current_time())

    def saved_seq(self) -> int:
        saved = load_roster(self.profile, self.chain.swarm_id)
        assert saved is not None
        return saved[0].seq

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self.allow_list.update(self.chain.roster(), trio.current_time())
        save_roster(self.profile, self.chain.swarm_id, tuple(self.chain.entries))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run)
            yield
            nursery.cancel_scope.cancel()

    async def _run(self) -> None:
        await poll_roster(
            self.script,
            self.chain.swarm_id,
            self.allow_list,
            self.profile,
            interval=INTERVAL_S,
            on_change=lambda removed, added: self.changes.append((removed, added)),
            rng=random.Random(0),
        )


@pytest.fixture
def poll(tmp_path: Path) -> Poll:
    chain = Chain()
    chain.add_peer(P)
    return Poll(chain=chain, script=Script(list(chain.entries)), profile=Profile(tmp_path))


@pytest.fixture(autouse=True)
def verify_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The virtual clock jumps ahead while every task waits, as for a thread."""

    async def run(function: Callable[[], Roster]) -> Roster:
        return function()

    monkeypatch.setattr(trio.to_thread, "run_sync", run)


async def test_a_list_is_verified_off_the_thread_that_serves(
    poll: Poll, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    autojump_clock.autojump_threshold = 0.2
    threads: list[threading.Thread] = []

    def verify(*args: object, **options: object) -> Roster:
        threads.append(threading.current_thread())
        return poll.chain.roster()

    monkeypatch.setattr(membership, "verify_chain", verify)
    async with poll.running():
        await trio.sleep(1.2 * INTERVAL_S)
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


async def test_unchanged_list_stays_fresh(
    poll: Poll, autojump_clock: trio.testing.MockClock
) -> None:
    async with poll.running():
        await trio.sleep(3600)
        assert poll.allow_list.state(trio.current_time()) == "fresh"
    gaps = [b - a for a, b in zip(poll.script.asked_at, poll.script.asked_at[1:], strict=False)]
    assert all(0.9 * INTERVAL_S <= gap <= 1.1 * INTERVAL_S for gap in gaps)
    assert len({round(gap, 3) for gap in gaps}) > 10
    assert poll.script.etags[0] is None
    assert None not in poll.script.etags[1:]
    assert poll.changes == []


async def test_removed_and_added_peers_are_reported_and_saved(
    poll: Poll, autojump_clock: trio.testing.MockClock
) -> None:
    async with poll.running():
        joined = poll.chain.roster().live[P.peer_id].joined
        poll.chain.append(poll.chain.remove(P, joined=joined))
        poll.chain.add_peer(Q)
        poll.script.entries = list(poll.chain.entries)
        await trio.sleep(30)
        assert not poll.allows(P.peer_id)
        assert poll.allows(Q.peer_id)
    assert poll.changes == [(frozenset({P.peer_id}), frozenset({Q.peer_id}))]
    assert poll.saved_seq() == poll.chain.roster().seq


async def test_unreachable_backend_lets_the_list_age_and_is_asked_again_soon(
    poll: Poll, autojump_clock: trio.testing.MockClock
) -> None:
    poll.script.entries = BackendUnreachable(url="http://127.0.0.1:1", problem="refused")
    async with poll.running():
        await trio.sleep(3600)
        assert poll.allow_list.state(trio.current_time()) == "stale"
        assert poll.allows(P.peer_id)
        poll.script.entries = list(poll.chain.entries)
        await trio.sleep(membership.MAX_BACKOFF_S * 1.1)
        assert poll.allow_list.state(trio.current_time()) == "fresh"
    gaps = [b - a for a, b in zip(poll.script.asked_at, poll.script.asked_at[1:], strict=False)]
    assert gaps[0] < 3
    assert max(gaps) <= membership.MAX_BACKOFF_S * 1.1


async def test_dead_backend_ends_with_nobody_allowed(
    poll: Poll, autojump_clock: trio.testing.MockClock
) -> None:
    poll.script.entries = BackendUnreachable(url="http://127.0.0.1:1", problem="refused")
    async with poll.running():
        await trio.sleep(24 * 3600 - 60)
        assert poll.allows(P.peer_id)
        await trio.sleep(120)
        assert not poll.allows(P.peer_id)


def rolled_back(chain: Chain) -> list[bytes]:
    return chain.entries[:1]


def forked(chain: Chain) -> list[bytes]:
    fork = Chain()
    fork.add_peer(Q)
    fork.add_peer(identity(5))
    return fork.entries


def forged(chain: Chain) -> list[bytes]:
    invite = chain.invite()
    return [*chain.entries, chain.entry(chain.certificate(invite, signer=Q))]


def emptied(chain: Chain) -> list[bytes]:
    return [*chain.entries, b""]


@pytest.mark.parametrize("lie", [rolled_back, forked, forged, emptied])
async def test_lying_backend_changes_nothing(
    poll: Poll,
    autojump_clock: trio.testing.MockClock,
    lie: Callable[[Chain], list[bytes]],
) -> None:
    poll.script.entries = lie(poll.chain)
    async with poll.running():
        await trio.sleep(3600)
        assert poll.allow_list.state(trio.current_time()) == "stale"
        assert poll.allow_list.members(trio.current_time()) == poll.chain.roster().members
    assert poll.changes == []
    assert poll.saved_seq() == poll.chain.roster().seq


async def test_full_disk_does_not_stop_a_removal(
    poll: Poll, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    async with poll.running():
        monkeypatch.setattr(membership, "write_private", fail)
        joined = poll.chain.roster().live[P.peer_id].joined
        poll.chain.append(poll.chain.remove(P, joined=joined))
        poll.script.entries = list(poll.chain.entries)
        await trio.sleep(100)
        assert not poll.allows(P.peer_id)
    assert poll.changes == [(frozenset({P.peer_id}), frozenset())]


async def test_an_expired_list_cuts_everybody_after_the_drain_until_it_is_renewed(
    poll: Poll, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    cuts: list[float] = []
    poll.allow_list = AllowList(max_stale_s=300)
    poll.allow_list.update(poll.chain.roster(), trio.current_time())
    expires_at = trio.current_time() + 300
    nursery.start_soon(cut_when_expired, poll.allow_list, lambda: cuts.append(trio.current_time()))
    await trio.sleep_until(expires_at + 1)
    assert not poll.allows(P.peer_id)
    await trio.sleep_until(expires_at + membership.DRAIN_S - 1)
    assert cuts == []
    await trio.sleep_until(expires_at + membership.DRAIN_S + 3 * membership.EXPIRY_INTERVAL_S)
    assert len(cuts) >= 2
    poll.allow_list.update(poll.chain.roster(), trio.current_time())
    before = len(cuts)
    await trio.sleep(300)
    assert len(cuts) == before
