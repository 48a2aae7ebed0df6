"""Both sides of link handshakes between the peers A and B, from fixed keys."""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from pals.errors import LinkRefused, WireVersionMismatch
from pals.net.handshake import (
    NONCE_BYTES,
    PREFIX_BYTES,
    PROPOSAL_BYTES,
    Handshake,
    KeyShare,
    LinkKeys,
    LinkSecrets,
)
from pals.net.wire import Codec
from pals.swarm.identity import Identity
from pals.swarm.keys import Role, epoch_prk
from pals.types import PeerId, SwarmId

A, B, C = (Identity.from_seed(bytes([i]) * 32).peer_id for i in (1, 2, 3))
SWARM = SwarmId(bytes(range(32)))
SECRET = bytes(range(32, 64))
EPOCH = 3
HELLO_BYTES = PREFIX_BYTES + PROPOSAL_BYTES


def make_secrets(
    local: PeerId = A,
    *,
    swarm: SwarmId = SWARM,
    epoch: int = EPOCH,
    secret: bytes = SECRET,
    codec: Codec = Codec.RAW,
) -> LinkSecrets:
    return LinkSecrets(
        swarm_id=swarm,
        epoch=epoch,
        epoch_prk=epoch_prk(swarm, epoch, secret),
        local=local,
        prefill_codec=codec,
    )


def make_share(seed: int, nonce: bytes) -> KeyShare:
    return KeyShare(X25519PrivateKey.from_private_bytes(bytes([seed]) * 32), nonce)


def make_side(
    role: Role,
    *,
    secrets: LinkSecrets | None = None,
    remote: PeerId | None = None,
    ephemeral: int | None = None,
    nonce: bytes | None = None,
) -> Handshake:
    """Return one side of a handshake in which A dials B, but for what is given."""
    is_initiator = role == "initiator"
    seed = ephemeral or (11 if is_initiator else 22)
    return Handshake(
        role,
        secrets or make_secrets(A if is_initiator else B),
        remote or (B if is_initiator else A),
        share=make_share(seed, nonce or role[:1].encode() * NONCE_BYTES),
    )


Refusal = LinkRefused | WireVersionMismatch | None


@dataclass
class Outcome:
    """How a handshake ended: the error of each side, and all that each side wrote."""

    initiator_error: Refusal = None
    responder_error: Refusal = None
    initiator_wrote: bytes = b""
    responder_wrote: bytes = b""


def pump(side: Handshake, inbox: bytearray) -> Refusal:
    """Give a side what it wants from its inbox; return the error that ends it."""
    while side.keys is None and len(inbox) >= side.wanted:
        data = bytes(inbox[: side.wanted])
        del inbox[: len(data)]
        try:
            side.receive(data)
        except (LinkRefused, WireVersionMismatch) as error:
            return error
    return None


def shake_hands(
    initiator: Handshake, responder: Handshake, *, tamper: dict[str, bytes] | None = None
) -> Outcome:
    """Carry a whole handshake; ``tamper`` replaces the flight of that name on the way."""
    replaced = tamper or {}
    outcome = Outcome()
    to_responder, to_initiator = bytearray(), bytearray()
    hello = initiator.take_outgoing()
    to_responder += replaced.get("hello", hello)
    outcome.responder_error = pump(responder, to_responder)
    outcome.responder_wrote = responder.take_outgoing()
    to_initiator += replaced.get("welcome", outcome.responder_wrote)
    outcome.initiator_error = pump(initiator, to_initiator)
    confirmation = initiator.take_outgoing()
    outcome.initiator_wrote = hello + confirmation
    if outcome.responder_error is None:
        to_responder += replaced.get("confirmation", confirmation)
        outcome.responder_error = pump(responder, to_responder)
    return outcome


def link_keys(
    initiator: Handshake | None = None, responder: Handshake | None = None
) -> tuple[LinkKeys, LinkKeys]:
    """Return the keys of both ends of a link between these two sides."""
    initiator = initiator or make_side("initiator")
    responder = responder or make_side("responder")
    shake_hands(initiator, responder)
    assert initiator.keys is not None
    assert responder.keys is not None
    return initiator.keys, responder.keys


INITIATOR, RESPONDER = link_keys()
RECORDED = shake_hands(make_side("initiator"), make_side("responder"))
HELLO = RECORDED.initiator_wrote[:HELLO_BYTES]
CONFIRMATION = RECORDED.initiator_wrote[HELLO_BYTES:]
WELCOME = RECORDED.responder_wrote
