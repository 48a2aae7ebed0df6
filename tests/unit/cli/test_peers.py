"""What `pals peers list` makes of the list, of sightings and of a running member's report."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pals.cli import peers
from pals.config import Profile
from pals.net.report import NetworkReport, PeerReport
from pals.swarm.identity import load_or_create_identity
from tests.unit.swarm.chains import Chain, identity

FIRST, SECOND = identity(11), identity(12)


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    profile = Profile(tmp_path / "profile")
    profile.create_folder()
    return profile


@pytest.fixture
def chain(profile: Profile) -> Chain:
    chain = Chain(founder=load_or_create_identity(profile))
    for peer in (FIRST, SECOND):
        chain.add_peer(peer)
    chain.append(chain.appoint(SECOND.public_key))
    return chain


def reporting(*reports: PeerReport, layers: str = "") -> NetworkReport:
    return NetworkReport(peer="me", reach="public", addresses=(), layers=layers, peers=reports)


def test_roles_and_sightings_are_those_of_each_member(profile: Profile, chain: Chain) -> None:
    listed = peers._peers(profile, chain.roster(), {FIRST.peer_id: 1000}, None)

    assert [(p.role, p.seen_at, p.layers, p.is_self) for p in listed] == [
        ("operator", None, "", True),
        ("member", 1000, "", False),
        ("admin", None, "", False),
    ]
    assert [p.invite.split()[0] for p in listed] == ["genesis", "invite", "invite"]


def test_who_answers_is_seen_now_and_serves_what_it_announces(
    profile: Profile, chain: Chain
) -> None:
    report = reporting(
        PeerReport(peer=FIRST.peer_id, path="direct", layers="0:10"),
        PeerReport(peer=SECOND.peer_id, problem="no answer", layers="10:20"),
        PeerReport(peer="of another swarm", path="direct", layers="0:1"),
        layers="20:30",
    )
    before = int(time.time())

    own, first, second = peers._peers(profile, chain.roster(), {SECOND.peer_id: 1000}, report)

    assert own.layers == "20:30"
    assert first.seen_at is not None
    assert first.seen_at >= before
    assert (first.layers, second.layers) == ("0:10", "10:20")
    assert second.seen_at == 1000
