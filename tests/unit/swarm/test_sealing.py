from __future__ import annotations

import pytest

from pals.errors import InvalidRecord
from pals.swarm.identity import Identity
from pals.swarm.sealing import SEALED_BYTES, open_secret, seal_secret
from pals.types import SwarmId
from tests.unit.swarm.chains import exchange, identity

SWARM, OTHER = SwarmId(b"s" * 32), SwarmId(b"t" * 32)
SECRET = bytes(range(32))
P, Q = identity(3), identity(4)


def seal(*, epoch: int = 1) -> bytes:
    return seal_secret(SECRET, exchange=exchange(P), swarm_id=SWARM, epoch=epoch, peer=P.peer_id)


def test_secret_reaches_the_member_it_is_sealed_to() -> None:
    sealed = seal()
    assert len(sealed) == SEALED_BYTES
    assert SECRET not in sealed
    assert open_secret(sealed, identity=P, swarm_id=SWARM, epoch=1) == SECRET
    assert sealed != seal()


@pytest.mark.parametrize(
    ("opener", "swarm", "epoch"),
    [(Q, SWARM, 1), (P, OTHER, 1), (P, SWARM, 2)],
    ids=["member", "swarm", "epoch"],
)
def test_it_opens_for_no_other(opener: Identity, swarm: SwarmId, epoch: int) -> None:
    with pytest.raises(InvalidRecord, match="does not open"):
        open_secret(seal(), identity=opener, swarm_id=swarm, epoch=epoch)


@pytest.mark.parametrize("position", [0, 31, 32, SEALED_BYTES - 1])
def test_changed_bytes_do_not_open(position: int) -> None:
    sealed = bytearray(seal())
    sealed[position] ^= 1
    with pytest.raises(InvalidRecord, match="does not open"):
        open_secret(bytes(sealed), identity=P, swarm_id=SWARM, epoch=1)


def test_another_length_and_a_degenerate_key_are_refused() -> None:
    with pytest.raises(InvalidRecord, match="79 bytes"):
        open_secret(seal()[:-1], identity=P, swarm_id=SWARM, epoch=1)
    with pytest.raises(InvalidRecord, match="degenerate"):
        seal_secret(SECRET, exchange=bytes(32), swarm_id=SWARM, epoch=1, peer=P.peer_id)
