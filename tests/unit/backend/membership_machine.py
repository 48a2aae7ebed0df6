"""A model of membership, and the rules by which Hypothesis plays against a backend.

The model knows nothing of records and hashes: invites with their uses, and who came by
which. After each step the backend's list is compared with it. The invariants:

I1  an invite never admits more peers than it may;
I2  what was acknowledged survives every crash;
I3  no invite admits anybody after it was revoked or has expired;
I4  who was removed is on no later list unless invited again;
I5  entries are numbered without a gap and each names the one before;
I6  a peer is a member once;
I7  a later list begins with every list that the same client saw;
I8  nothing that is stored holds a secret (`play` returns them, for its caller to look).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pals.swarm.identity import Identity
from pals.swarm.invite import Invite
from pals.swarm.records import NO_ENTRY, Join, decode_entry, decode_record, digest
from pals.swarm.requests import sign_request
from pals.swarm.roster import Roster, verify_chain
from tests.unit.backend.crashing import Crashing, Died, Operation, Outcome
from tests.unit.swarm.chains import NOW, Chain, identity

PEERS = tuple(identity(20 + number) for number in range(5))
CLIENTS = 3
REFUSED, UNFIT = "InviteRefused", "InvalidRecord"
_operators = itertools.count(100_000)

peers = st.integers(0, len(PEERS) - 1)
picks = st.integers(0, 1 << 16)
# A transaction has about eight steps; from there on the answer itself is lost.
deaths = st.none() | st.integers(0, 10)


@dataclass
class KnownInvite:
    """What the model knows of an invite."""

    invite: Invite
    max_uses: int
    not_after: int
    closed: bool = False
    came: set[int] = field(default_factory=set[int])

    def admits_nobody(self, now: int) -> bool:
        expired = bool(self.not_after) and now > self.not_after
        return self.closed or expired or len(self.came) >= self.max_uses


class MembershipMachine(RuleBasedStateMachine):
    """Five peers and an operator over one backend; subclasses say which."""

    backend: Crashing
    secrets: list[bytes]

    def teardown(self) -> None:
        invites = [known.invite for known in self.invites]
        self.secrets += [invite.auth for invite in invites]
        self.secrets += [invite.signing_key.reveal_seed() for invite in invites]
        self.secrets.append(self.chain.operator.reveal_seed())

    @initialize()
    def create_swarm(self) -> None:
        self.now = NOW
        self.chain = Chain(operator=identity(next(_operators)))
        self.invites: list[KnownInvite] = []
        self.live: dict[int, tuple[KnownInvite, bytes]] = {}
        self.stored: set[bytes] = set()
        self.acknowledged: list[bytes] = []
        self.seen: list[tuple[bytes, ...]] = [()] * CLIENTS
        self.epoch = 0
        self.verified: Roster | None = None
        genesis = Operation(record=self.chain.genesis, now=self.now)
        self._expect(self._call(lambda: genesis, None), "")

    @rule(max_uses=st.integers(1, 3), lasts_s=st.sampled_from([0, 0, 30]), die_at=deaths)
    def invite(self, max_uses: int, lasts_s: int, die_at: int | None) -> None:
        not_after = self.now + lasts_s if lasts_s else 0
        known = KnownInvite(invite=self.chain.invite(), max_uses=max_uses, not_after=not_after)
        record = self.chain.certificate(known.invite, max_uses=max_uses, not_after=not_after)
        self._expect(self._append(record, die_at), "")
        self.invites.append(known)

    @precondition(lambda self: self.invites)
    @rule(pick=picks, peer=peers, die_at=deaths)
    def redeem(self, pick: int, peer: int, die_at: int | None) -> None:
        known = self.invites[pick % len(self.invites)]
        record = self.chain.join(known.invite.signing_key, PEERS[peer])
        member = self.live.get(peer)
        repeated = member is not None and member[1] == record
        expected = ""
        if not repeated and known.admits_nobody(self.now):
            expected = REFUSED
        elif not repeated and (peer in known.came or member is not None):
            expected = UNFIT
        operation = Operation(
            record=record, now=self.now, swarm_id=self.chain.swarm_id, auth=known.invite.auth
        )
        self._expect(self._call(lambda: operation, die_at), expected)
        if not expected:
            known.came.add(peer)
            self.live[peer] = (known, record)

    @rule(peer=peers)
    def guess(self, peer: int) -> None:
        invite = self.chain.invite()
        operation = Operation(
            record=self.chain.join(invite.signing_key, PEERS[peer]),
            now=self.now,
            swarm_id=self.chain.swarm_id,
            auth=invite.auth,
        )
        self._expect(self._call(lambda: operation, None), REFUSED)

    @precondition(lambda self: self.invites)
    @rule(pick=picks, die_at=deaths)
    def revoke(self, pick: int, die_at: int | None) -> None:
        known = self.invites[pick % len(self.invites)]
        record = self.chain.revoke(known.invite)
        fits = record in self.stored or not known.closed
        self._expect(self._append(record, die_at), "" if fits else UNFIT)
        known.closed = True

    @precondition(lambda self: self.live)
    @rule(pick=picks, die_at=deaths)
    def kick(self, pick: int, die_at: int | None) -> None:
        peer = self._member(pick)
        known, join = self.live.pop(peer)
        record = self.chain.remove(PEERS[peer], joined=digest(join))
        self._expect(self._append(record, die_at), "")
        known.closed = True

    @precondition(lambda self: self.live)
    @rule(pick=picks, die_at=deaths)
    def leave(self, pick: int, die_at: int | None) -> None:
        peer = self._member(pick)
        _, join = self.live.pop(peer)
        record = self.chain.leave(PEERS[peer], joined=digest(join))
        operation = Operation(record=record, now=self.now, swarm_id=self.chain.swarm_id)
        self._expect(self._call(lambda: operation, die_at), "")

    @rule(die_at=deaths)
    def rotate(self, die_at: int | None) -> None:
        self._expect(self._append(self.chain.epoch(self.epoch + 1), die_at), "")
        self.epoch += 1

    @rule(peer=peers)
    def forge(self, peer: int) -> None:
        record = self.chain.epoch(self.epoch + 1, signer=PEERS[peer])
        self._expect(self._append(record, None, signer=PEERS[peer]), UNFIT)

    @rule(seconds=st.integers(1, 40))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule()
    def crash(self) -> None:
        self.backend.crash()

    @rule(client=st.integers(0, CLIENTS - 1))
    def read(self, client: int) -> None:
        entries, before = self.backend.entries(self.chain.swarm_id), self.seen[client]
        assert entries[: len(before)] == before  # I7
        self.seen[client] = entries

    @invariant()
    def list_is_that_of_the_model(self) -> None:
        entries = self.backend.entries(self.chain.swarm_id)
        assert len(set(self.acknowledged) - set(entries)) == 0  # I2
        previous = NO_ENTRY
        for seq, data in enumerate(entries):
            entry = decode_entry(data)
            assert (entry.seq, entry.previous) == (seq, previous)  # I5
            previous = digest(data)
        roster = verify_chain(self.chain.swarm_id, entries, known=self.verified)
        self.verified = roster
        expected = {self.chain.founder.peer_id, *(PEERS[peer].peer_id for peer in self.live)}
        assert roster.members == expected  # I4, I6
        assert roster.epoch == self.epoch
        records = [decode_record(decode_entry(data).record) for data in entries]
        for known in self.invites:
            key = known.invite.signing_key.public_key
            joins = [r.peer for r in records if isinstance(r, Join) and r.invite == key]
            assert len(joins) <= known.max_uses  # I1
            assert sorted(joins) == sorted(PEERS[peer].public_key for peer in known.came)  # I3

    def _member(self, pick: int) -> int:
        return sorted(self.live)[pick % len(self.live)]

    def _append(
        self, record: bytes, die_at: int | None, *, signer: Identity | None = None
    ) -> Outcome:
        """Store a record by a request that the operator, or ``signer``, makes."""
        path = f"/v1/swarms/{self.chain.swarm_id.hex()}/records"

        def request() -> Operation:
            proof = sign_request(
                signer or self.chain.operator, method="POST", path=path, body=record, at=self.now
            )
            return Operation(
                record=record,
                now=self.now,
                swarm_id=self.chain.swarm_id,
                path=path,
                authorization=proof,
            )

        return self._call(request, die_at)

    def _call(self, request: Callable[[], Operation], die_at: int | None) -> Outcome:
        """Make a request, and again when its answer was lost, as whoever asks would."""
        try:
            return self.backend.call(request(), die_at)
        except Died:
            return self.backend.call(request())

    def _expect(self, outcome: Outcome, error: str) -> None:
        assert outcome.error == error
        if outcome.entry:
            self.acknowledged.append(outcome.entry)
            self.stored.add(decode_entry(outcome.entry).record)


def play(backend: Crashing, *, games: int, steps: int) -> list[bytes]:
    """Play against a backend, one swarm a game, and return every secret of the players."""

    class Machine(MembershipMachine):
        pass

    Machine.backend, Machine.secrets = backend, [peer.reveal_seed() for peer in PEERS]
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=games, stateful_step_count=steps, suppress_health_check=list(HealthCheck)
        ),
    )
    return Machine.secrets
