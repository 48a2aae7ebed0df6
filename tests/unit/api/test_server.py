from __future__ import annotations

import socket

import pytest

from pals.api.server import check_public_bind, listen
from pals.errors import PortInUse, PublicBindWithoutKey

PUBLIC = [
    "0.0.0.0",
    "0",
    "0x0",
    "0x00000000",
    "000.000.000.000",
    "134744072",
    "010.0.0.1",
    "0xC0A80001",
    "",
    "*",
    "::",
    "[::]",
    "0:0:0:0:0:0:0:0",
    "::ffff:0.0.0.0",
    "::ffff:127.0.0.1",
    "[::ffff:0.0.0.0]",
    "::ffff:10.0.0.1",
    "10.0.0.1",
    "192.168.1.2",
    "8.8.8.8",
    "fe80::1",
    "2001:db8::1",
    "a" * 300,
    "local\x00host",
    "/run/pals.sock",
]


@pytest.mark.parametrize("host", PUBLIC)
def test_a_bind_that_is_not_loopback_needs_a_key(host: str) -> None:
    with pytest.raises(PublicBindWithoutKey):
        check_public_bind(host, has_keys=False)
    with pytest.raises(PublicBindWithoutKey):
        listen(host, 0, has_keys=False)


@pytest.mark.parametrize("host", PUBLIC)
def test_a_key_allows_any_bind(host: str) -> None:
    check_public_bind(host, has_keys=True)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "127.8.8.8",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "::1",
        "[::1]",
        "localhost",
    ],
)
def test_loopback_in_every_spelling_needs_no_key(host: str) -> None:
    check_public_bind(host, has_keys=False)


def test_a_name_that_resolves_elsewhere_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

    with pytest.raises(PublicBindWithoutKey):
        check_public_bind("localhost", has_keys=False)


def test_port_0_takes_a_free_port_and_says_which() -> None:
    listener = listen("127.0.0.1", 0, has_keys=False)

    with listener.socket:
        assert listener.url == f"http://127.0.0.1:{listener.port}"
        assert listener.port > 0


def test_a_taken_port_is_refused_before_anything_starts() -> None:
    first = listen("127.0.0.1", 0, has_keys=False)

    with first.socket, pytest.raises(PortInUse) as caught:
        listen("127.0.0.1", first.port, has_keys=False)

    assert caught.value.fields["port"] == first.port
