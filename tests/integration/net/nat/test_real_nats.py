"""Members behind real NATs, in network namespaces; skipped where those cannot be made."""

from __future__ import annotations

import shutil

import pytest

from pals.errors import NoPath
from pals.net.nat.traversal import TraversalOptions
from pals.net.raw import DIRECT, PUNCHED, Path
from tests.integration.net.harness import ECHO
from tests.integration.net.nat import lab
from tests.integration.net.nat.members import PLAIN, RELAYS, USES_RELAYS
from tests.waiting import wait_until

DEADLINE_S = 20.0


@pytest.fixture(scope="module", autouse=True)
def permitted():
    if problem := lab.missing():
        pytest.skip(problem)


async def ask_echo(member, peer):
    stream = await member.host.open_stream(peer, ECHO, connected_only=True)
    await stream.write(b"hello")
    answer = await stream.read_exactly(5)
    await stream.close()
    return answer


def until(condition):
    return wait_until(condition, deadline_s=DEADLINE_S)


async def path(member, peer):
    return member.host.path(peer)


@pytest.mark.parametrize("nats", [("port-preserving", "port-preserving")])
def test_members_behind_nats_that_keep_ports_connect_directly(nats):
    with (
        lab.open_lab(*nats) as net,
        lab.start_members((net.public, PLAIN), *((site.host, PLAIN) for site in net.sites)) as (
            _,
            a,
            b,
        ),
    ):
        a.call(lambda m: m.host.connect(b.peer_id, []))

        assert a.call(lambda m: path(m, b.peer_id)) == PUNCHED
        assert a.call(lambda m: ask_echo(m, b.peer_id)) == b"hello"
        assert until(lambda: b.call(lambda m: path(m, a.peer_id))) == PUNCHED


def test_members_behind_symmetric_nats_are_relayed_when_all_want_it():
    with (
        lab.open_lab("symmetric", "symmetric") as net,
        lab.start_members(
            (net.public, RELAYS), *((site.host, USES_RELAYS) for site in net.sites)
        ) as (middle, a, b),
    ):
        a.call(lambda m: m.host.connect(b.peer_id, []))

        assert a.call(lambda m: path(m, b.peer_id)) == Path("relayed", middle.peer_id)
        assert a.call(lambda m: ask_echo(m, b.peer_id)) == b"hello"


def test_members_behind_symmetric_nats_are_told_what_to_do_when_nobody_relays():
    with (
        lab.open_lab("symmetric", "symmetric") as net,
        lab.start_members((net.public, PLAIN), *((site.host, PLAIN) for site in net.sites)) as (
            _,
            a,
            b,
        ),
    ):
        with pytest.raises(NoPath) as caught:
            a.call(lambda m: m.host.connect(b.peer_id, []))

        assert "no hole within" in caught.value.fields["punched"]
        assert "--use-relay" in caught.value.hint


async def reach(member):
    return member.traversal.state.reach


async def addresses(member):
    return member.host.addresses()


async def observed(member, peer):
    return member.host.observed(peer)


@pytest.mark.slow
def test_a_nat_that_shows_another_port_is_punched_once_a_member_saw_the_port():
    with (
        lab.open_lab("other-port", "port-preserving") as net,
        lab.start_members((net.public, PLAIN), *((site.host, PLAIN) for site in net.sites)) as (
            middle,
            a,
            b,
        ),
    ):
        until(lambda: len(middle.call(lambda m: observed(m, a.peer_id))) == 2)

        b.call(lambda m: m.host.connect(a.peer_id, []))

        assert b.call(lambda m: path(m, a.peer_id)) == PUNCHED


def test_members_find_out_that_they_cannot_be_dialled_and_say_where_to_meet():
    with (
        lab.open_lab("port-preserving") as net,
        lab.start_members((net.public, PLAIN), *((site.host, PLAIN) for site in net.sites)) as (
            middle,
            a,
        ),
    ):
        assert until(lambda: (r := a.call(reach)) != "unknown" and r) == "private"

        place = f"/p2p/{middle.peer_id}/p2p-circuit/p2p/{a.peer_id}"
        assert place in a.call(addresses)


def test_a_port_forward_that_is_announced_is_tried_and_used():
    with lab.open_lab("symmetric", "symmetric") as net:
        site, other = net.sites
        forward = site.forward(lab.PORT + 1000)
        options = TraversalOptions(upnp=False, announced=(forward,))
        with lab.start_members((net.public, PLAIN), (site.host, options), (other.host, PLAIN)) as (
            _,
            a,
            b,
        ):
            assert a.call(addresses)[0] == f"{forward}/p2p/{a.peer_id}"
            assert until(lambda: (r := a.call(reach)) != "unknown" and r) == "public"

            b.call(lambda m: m.host.connect(a.peer_id, [forward]))
            assert b.call(lambda m: path(m, a.peer_id)) == DIRECT


@pytest.mark.skipif(shutil.which("miniupnpd") is None, reason="`miniupnpd` is not installed")
def test_a_router_that_speaks_upnp_forwards_the_port_while_the_member_runs(tmp_path):
    with lab.open_lab("symmetric", "symmetric") as net:
        site, other = net.sites
        options = TraversalOptions(make_gateway=lambda: lab.GatewayOf(site))
        with site.forwarding_ports(tmp_path):
            with lab.start_members(
                (net.public, PLAIN), (site.host, options), (other.host, PLAIN)
            ) as (_, a, b):
                mapped = f"/ip4/{site.public_ip}/tcp/{lab.PORT}/p2p/{a.peer_id}"
                until(lambda: a.call(reach) == "public")
                assert a.call(addresses)[0] == mapped
                assert "dnat" in site.forwards()

                b.call(lambda m: m.host.connect(a.peer_id, [mapped]))
                assert b.call(lambda m: path(m, a.peer_id)) == DIRECT
            assert "dnat" not in site.forwards()


@pytest.mark.slow
def test_a_relayed_connection_becomes_direct_when_punching_works_later():
    uses = TraversalOptions(upnp=False, use_relay=True, upgrade_s=0.5)
    with (
        lab.open_lab("symmetric", "symmetric") as net,
        lab.start_members((net.public, RELAYS), *((site.host, uses) for site in net.sites)) as (
            middle,
            a,
            b,
        ),
    ):
        a.call(lambda m: m.host.connect(b.peer_id, []))
        assert a.call(lambda m: path(m, b.peer_id)) == Path("relayed", middle.peer_id)

        for site in net.sites:
            site.translate("port-preserving")

        assert until(lambda: a.call(lambda m: path(m, b.peer_id)) == PUNCHED)
        assert a.call(lambda m: ask_echo(m, b.peer_id)) == b"hello"
        until(lambda: not middle.call(circuits))


async def circuits(member):
    return member.traversal.relay.book.circuits
