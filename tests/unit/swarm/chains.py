"""Builds signed membership chains for tests, honest ones and forged ones."""

from __future__ import annotations

from dataclasses import dataclass, field

from pals.config import SwarmSecret
from pals.swarm.identity import Identity
from pals.swarm.invite import Invite
from pals.swarm.keys import secret_commitment
from pals.swarm.records import (
    NO_ENTRY,
    Appoint,
    Appointment,
    Entry,
    Epoch,
    Genesis,
    InviteCertificate,
    Join,
    Leave,
    Remove,
    Revoke,
    decode_entry,
    digest,
    encode,
    sign_by,
    sign_genesis,
    sign_join,
    sign_leave,
)
from pals.swarm.roster import Roster, verify_chain
from pals.types import SwarmId

NOW = 1_800_000_000
URL = "http://127.0.0.1:8470"
SECRET = SwarmSecret(digest(b"swarm secret"))


def identity(number: int) -> Identity:
    return Identity.from_seed(digest(number.to_bytes(32, "big")))


def exchange(peer: Identity) -> bytes:
    return peer.exchange_key().public_key().public_bytes_raw()


@dataclass
class Chain:
    """A swarm whose operator key, founder and entries the test holds."""

    operator: Identity = field(default_factory=lambda: identity(1))
    founder: Identity = field(default_factory=lambda: identity(2))
    entries: list[bytes] = field(default_factory=list[bytes])

    def __post_init__(self) -> None:
        genesis = Genesis(
            name="home",
            model="org/model",
            created_at=NOW,
            operator=self.operator.public_key,
            peer=self.founder.public_key,
            exchange=exchange(self.founder),
            commitment=secret_commitment(0, SECRET.reveal()),
        )
        self.genesis = encode(sign_genesis(genesis, operator=self.operator, peer=self.founder))
        self.swarm_id = SwarmId(digest(self.genesis))
        if not self.entries:
            self.append(self.genesis)

    def append(self, record: bytes, *, at: int = NOW) -> None:
        self.entries.append(self.entry(record, at=at))

    def entry(self, record: bytes, *, at: int = NOW) -> bytes:
        """Return the entry that a hacked or honest backend would make of ``record``."""
        previous = digest(self.entries[-1]) if self.entries else NO_ENTRY
        return encode(
            Entry(seq=len(self.entries), previous=previous, received_at=at, record=record)
        )

    def roster(self) -> Roster:
        return verify_chain(self.swarm_id, self.entries)

    def invite(self) -> Invite:
        return Invite.generate(
            swarm_id=self.swarm_id,
            backend_url=URL,
            epoch=0,
            secret=SECRET,
        )

    def certificate(
        self,
        invite: Invite,
        *,
        max_uses: int = 1,
        not_after: int = 0,
        signer: Identity | None = None,
        swarm_id: bytes | None = None,
    ) -> bytes:
        certificate = InviteCertificate(
            swarm_id=swarm_id or self.swarm_id,
            invite=invite.signing_key.public_key,
            redeem_hash=invite.redeem_hash,
            max_uses=max_uses,
            not_after=not_after,
        )
        return encode(sign_by(certificate, signer or self.operator))

    def join(
        self,
        invite: Identity,
        peer: Identity,
        *,
        invite_signer: Identity | None = None,
        peer_signer: Identity | None = None,
        swarm_id: bytes | None = None,
    ) -> bytes:
        join = Join(
            swarm_id=swarm_id or self.swarm_id,
            invite=invite.public_key,
            peer=peer.public_key,
            exchange=exchange(peer),
        )
        return encode(sign_join(join, invite=invite_signer or invite, peer=peer_signer or peer))

    def remove(self, peer: Identity, *, joined: bytes, signer: Identity | None = None) -> bytes:
        record = Remove(swarm_id=self.swarm_id, peer=peer.public_key, joined=joined, created_at=NOW)
        return encode(sign_by(record, signer or self.operator))

    def revoke(self, invite: Invite, *, signer: Identity | None = None) -> bytes:
        record = Revoke(
            swarm_id=self.swarm_id, invite=invite.signing_key.public_key, created_at=NOW
        )
        return encode(sign_by(record, signer or self.operator))

    def leave(self, peer: Identity, *, joined: bytes, signer: Identity | None = None) -> bytes:
        record = Leave(swarm_id=self.swarm_id, peer=peer.public_key, joined=joined)
        return encode(sign_leave(record, peer=signer or peer))

    def epoch(
        self, number: int, *, secret: bytes = bytes(32), signer: Identity | None = None
    ) -> bytes:
        record = Epoch(
            swarm_id=self.swarm_id,
            number=number,
            commitment=secret_commitment(number, secret),
            created_at=NOW,
        )
        return encode(sign_by(record, signer or self.operator))

    def appoint(
        self, key: bytes, role: Appointment = "admin", *, signer: Identity | None = None
    ) -> bytes:
        record = Appoint(swarm_id=self.swarm_id, key=key, role=role, created_at=NOW)
        return encode(sign_by(record, signer or self.operator))

    def add_peer(self, peer: Identity) -> bytes:
        """Append an invite and the join of ``peer``; return the join."""
        invite = self.invite()
        self.append(self.certificate(invite))
        join = self.join(invite.signing_key, peer)
        self.append(join)
        return join


def record_of(entry: bytes) -> bytes:
    return decode_entry(entry).record


def rechain(records: list[bytes]) -> list[bytes]:
    """Return honestly numbered and hashed entries over any records, as a liar would."""
    entries: list[bytes] = []
    previous = NO_ENTRY
    for seq, record in enumerate(records):
        entries.append(encode(Entry(seq=seq, previous=previous, received_at=NOW, record=record)))
        previous = digest(entries[-1])
    return entries
