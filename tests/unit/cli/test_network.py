from __future__ import annotations

import pytest

from pals.cli import network
from pals.cli.network import Network, examine_network
from pals.cli.process import ServerOptions
from pals.config import Profile, SwarmEntry, SwarmSecret
from pals.errors import NoPath
from pals.net.report import NetworkReport, PeerReport

DIRECT = PeerReport(peer="A", path="direct", round_trip_ms=1.25)
PUNCHED = PeerReport(peer="B", path="punched", round_trip_ms=20.0)
RELAYED = PeerReport(peer="C", path="relayed", relay="R", round_trip_ms=40.0)
SILENT = PeerReport(peer="D", problem="no answer", code="PALS-PEER-UNREACHABLE")
LOST = PeerReport(peer="E", problem="no way", code=NoPath.code, hint="relay")


def reporting(*peers: PeerReport, reach: str = "public") -> NetworkReport:
    return NetworkReport(peer="ME", reach=reach, addresses=("/ip4/1.2.3.4/tcp/1",), peers=peers)


def test_each_member_has_a_row_with_the_way_to_it_and_the_round_trip() -> None:
    report = reporting(DIRECT, PUNCHED, RELAYED, SILENT)
    found = Network(network._judge(report), report)

    assert found.rows() == [
        ("A", "direct", "1.2 ms", ""),
        ("B", "punched", "20.0 ms", ""),
        ("C", "relayed by R", "40.0 ms", ""),
        ("D", "none", "", "no answer"),
    ]


@pytest.mark.parametrize(
    ("peers", "state", "text"),
    [
        ((), "ok", "can dial"),
        ((DIRECT, SILENT), "ok", "can dial"),
        ((SILENT,), "warn", "no other member answers"),
        ((DIRECT, LOST), "warn", "no way to 1 of them"),
    ],
)
def test_members_that_are_off_are_no_fault_but_one_without_a_way_is(peers, state, text) -> None:
    finding = network._judge(reporting(*peers))

    assert (finding.state, text in finding.text) == (state, True)
    assert bool(finding.hint) == (state == "warn")


@pytest.mark.parametrize(
    ("reach", "text"),
    [("public", "can dial"), ("private", "cannot dial"), ("unknown", "no member")],
)
def test_the_line_says_whether_members_can_dial_this_machine(reach, text) -> None:
    assert text in network._judge(reporting(DIRECT, reach=reach)).text


def test_a_profile_of_no_swarm_has_no_network_to_examine(tmp_path) -> None:
    assert examine_network(ServerOptions(config_dir=tmp_path)) is None


def test_a_process_that_holds_the_profile_and_does_not_answer_is_a_failure(tmp_path) -> None:
    profile = Profile(tmp_path / "profile")
    profile.create_folder()
    entry = SwarmEntry(
        swarm_id="00" * 32,
        name="test",
        model="model",
        backend_url="http://127.0.0.1:1",
        epoch=0,
        swarm_secret=SwarmSecret.generate().to_text(),
        peer_credential="",
    )
    profile.save_swarm(entry)

    with profile.lock():
        found = examine_network(ServerOptions(config_dir=profile.path))

    assert found is not None
    assert (found.finding.state, found.document(), found.rows()) == ("fail", None, [])
    assert "in use" in found.finding.text
