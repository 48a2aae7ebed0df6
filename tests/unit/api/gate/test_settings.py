from __future__ import annotations

import pytest

from pals.api.gate import GateSettings
from pals.errors import InvalidConfig


def test_a_name_without_a_port_is_a_host_with_and_without_the_listener_s() -> None:
    settings = GateSettings.for_bind("127.0.0.1", 8080, hosts=["Pals.Example", "other.lan:9000"])

    for host in ("pals.example", "pals.example:8080", "other.lan:9000"):
        assert settings.has_host(host, "127.0.0.1")
    for host in ("pals.example:80", "other.lan", "other.lan:8080", "x.pals.example"):
        assert not settings.has_host(host, "127.0.0.1")


@pytest.mark.parametrize(
    "host", ["", "*", "*.example", "http://a.example", "a.example/", "a b", "user@a.example", "a:b"]
)
def test_what_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(InvalidConfig):
        GateSettings.for_bind("127.0.0.1", 8080, hosts=[host])


@pytest.mark.parametrize(
    "origin",
    ["https://app.example", "http://localhost:3000", "app://obsidian.md", "tauri://localhost"],
)
def test_an_origin_is_a_scheme_a_host_and_a_port(origin: str) -> None:
    assert GateSettings.for_bind("127.0.0.1", 8080, origins=[origin]).origins == {origin}


@pytest.mark.parametrize(
    "origin", ["", "*", "null", "https://*", "https://*.example", "app.example", "https://a/b"]
)
def test_an_origin_that_may_be_anybody_s_is_refused(origin: str) -> None:
    with pytest.raises(InvalidConfig):
        GateSettings.for_bind("127.0.0.1", 8080, origins=[origin])
