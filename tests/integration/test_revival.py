"""A member that comes back after its list expired, to a swarm whose backend is gone."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from pals.config import KnownPeer, Profile
from pals.errors import RosterUnavailable
from pals.net import revival
from pals.net.administration import appoint, load_operator, open_administrator
from pals.net.enrolment import create_invite
from pals.net.membership import keep_list, load_saved
from pals.net.node import Node, NodeOptions, open_node
from pals.swarm import ledger
from pals.swarm.allowlist import MAX_STALE_S
from pals.swarm.freshness import decode_freshness, sign_freshness
from pals.swarm.identity import Identity, load_or_create_identity
from tests.integration.net.harness import until
from tests.integration.swarm import TestSwarm, make_swarm

GONE = "http://127.0.0.1:9"
NOW = time.time()

pytestmark = [pytest.mark.trio, pytest.mark.timeout(60)]


@pytest.fixture
async def swarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TestSwarm]:
    monkeypatch.setattr(ledger, "RENEW_S", 0.2)
    monkeypatch.setattr(revival, "ASK_S", 3.0)
    async with make_swarm(tmp_path, count=2) as swarm:
        yield swarm


def expired(swarm: TestSwarm, profile: Profile, met: Node) -> NodeOptions:
    """Return the options of a member that was away for long, and met one other before."""
    options = swarm.options(profile)
    operator = load_operator(swarm.operator, swarm.operator.load_swarm())
    saved = load_saved(profile, options.swarm_id)
    assert operator is not None
    assert saved is not None
    word = sign_freshness(operator, saved.roster, at=int(time.time() - MAX_STALE_S - 60))
    keep_list(profile, options.swarm_id, replace(saved.held, word=word))
    known = KnownPeer(peer=met.peer_id, addresses=met.host.addresses(), reached_at=0)
    profile.save_known_peers(options.entry.swarm_id, [known])
    return replace(options, entry=msgspec.structs.replace(options.entry, backend_url=GONE))


async def speaks(node: Node, signer: Identity) -> None:
    """Wait until a node tells others that the list is the newest by the word of somebody."""

    def is_signed() -> bool:
        word = node.keeper.news().freshness
        return bool(word) and decode_freshness(word).signer == signer.public_key

    await until(is_signed)


async def test_a_member_takes_the_list_from_another_that_has_the_operator_s_word(
    swarm: TestSwarm,
) -> None:
    operator = load_operator(swarm.operator, swarm.operator.load_swarm())
    assert operator is not None
    late = swarm.peers[0]
    await create_invite(swarm.operator, now=NOW)  # an entry that the late one does not have
    async with open_node(swarm.options(swarm.operator)) as node:
        await speaks(node, operator)
        options = expired(swarm, late, node)
        async with open_node(options) as back:
            assert back.keeper.report().state == "fresh"
            assert back.keeper.news().seq == node.keeper.news().seq
            assert back.host.connected_peers() >= {node.peer_id}
        saved = load_saved(late, options.swarm_id)
        assert saved is not None
        assert saved.roster.seq == node.keeper.news().seq


async def test_nobody_else_s_word_puts_an_expired_list_in_force_again(swarm: TestSwarm) -> None:
    """An admin of the old list may have been dismissed since, and keep quiet about it."""
    late, admin = swarm.peers
    identity = load_or_create_identity(admin)
    administrator = await open_administrator(swarm.operator, now=NOW)
    await appoint(administrator, identity.peer_id, "admin", now=NOW)
    async with open_node(swarm.options(admin)) as node:
        await speaks(node, identity)
        with pytest.raises(RosterUnavailable, match="was the newest 24 h ago"):
            async with open_node(expired(swarm, late, node)):
                pass


async def test_without_any_member_an_expired_list_starts_nothing(swarm: TestSwarm) -> None:
    late = swarm.peers[0]
    async with open_node(swarm.options(swarm.operator)) as node:
        options = expired(swarm, late, node)
    with pytest.raises(RosterUnavailable):
        async with open_node(options):
            pass
