"""M3 and M5 without a network: what a former member holds opens nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pals.errors import InvalidFrame, InvalidRecord
from pals.net.link import Link
from pals.net.wire import HEADER_BYTES, Lane, pack_header
from pals.swarm.allowlist import AllowList
from pals.swarm.keys import TAG_BYTES
from pals.swarm.records import digest
from pals.swarm.sealing import open_secret, seal_secret
from tests.unit.net.handshakes import EPOCH, make_secrets
from tests.unit.net.link_pairs import HIDDEN, frames_in, make_pair, receive, shares_from
from tests.unit.swarm.chains import Chain, exchange, identity

P, KICKED = identity(3), identity(5)
NEW_SECRET = digest(b"the next secret")


def test_m3_a_kicked_member_opens_no_envelope_of_those_who_stay() -> None:
    chain = Chain()
    about = {"swarm_id": chain.swarm_id, "epoch": 1}
    sealed = seal_secret(NEW_SECRET, exchange=exchange(P), peer=P.peer_id, **about)
    assert open_secret(sealed, identity=P, **about) == NEW_SECRET
    for identity_used, changed in ((KICKED, about), (P, {**about, "epoch": 2})):
        with pytest.raises(InvalidRecord):
            open_secret(sealed, identity=identity_used, **changed)


def test_m3_a_kicked_member_reads_nothing_of_the_next_epoch() -> None:
    """It has every key of the old epoch, the old secret and the recording, and no share."""
    pair = make_pair()
    old_keys = pair.dialler.link._keys
    pair.learn(EPOCH + 1)
    pair.deliver_all()
    pair.send("dialler")
    [frame] = frames_in(pair.dialler.wires[Lane.DECODE])
    stale = Link(old_keys, make_secrets(), now=0.0, make_share=shares_from("former"))
    with pytest.raises(InvalidFrame):
        receive(stale, Lane.DECODE, frame)
    address = replace(old_keys.address, epoch=EPOCH)
    body = len(frame) - HEADER_BYTES - TAG_BYTES
    header = pack_header(address, Lane.DECODE, 0, HIDDEN, 1, body)
    stale = Link(old_keys, make_secrets(), now=0.0, make_share=shares_from("former"))
    with pytest.raises(InvalidFrame):
        receive(stale, Lane.DECODE, header + frame[HEADER_BYTES:])


def test_m5_without_a_verified_list_nobody_is_allowed() -> None:
    nothing = AllowList()
    assert nothing.state(0.0) == "none"
    assert nothing.members(0.0) == frozenset()
    assert not nothing.allows(P.peer_id, 0.0)
