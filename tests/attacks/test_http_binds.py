"""H10: an endpoint that others can reach asks for a key, however its address is spelled."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pals.api.key_file import FILE_NAME, create_key, revoke_key
from pals.api.server import listen
from pals.cli.app import run
from pals.errors import PublicBindWithoutKey
from tests.attacks.raw_http import Endpoint
from tests.fakes import FakeDriver
from tests.integration.api.servers import running

PUBLIC = [
    "0.0.0.0",
    "0",
    "0x0",
    "00",
    "0.0",
    "000.0.0.0",
    "*",
    "::",
    "[::]",
    "::0",
    "0:0:0:0:0:0:0:0",
    "::ffff:0.0.0.0",
    "::ffff:0:0",
    "[::ffff:127.0.0.1]",
    "::ffff:10.0.0.1",
    "10.0.0.1",
    "167772161",
    "0x0a000001",
    "012.0.0.1",
    "fe80::1",
    "no-such-name.invalid",
    "/run/pals.sock",
    "unix:/run/pals.sock",
    "\x00pals",
]


def refuses(host: str, profile: Path, capsys: pytest.CaptureFixture[str]) -> bool:
    status = run(["serve", "--host", host, "--port", "0", "--config-dir", str(profile)])
    return status == 2 and "without an API key" in capsys.readouterr().err


@pytest.mark.parametrize("host", PUBLIC)
def test_h10_pals_serve_refuses_a_public_bind_without_a_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], host: str
) -> None:
    assert refuses(host, tmp_path, capsys)
    with pytest.raises(PublicBindWithoutKey):
        listen(host, 0, has_keys=False)


def test_h10_an_empty_host_is_every_address() -> None:
    with pytest.raises(PublicBindWithoutKey):
        listen("", 0, has_keys=False)


def test_h10_a_preset_can_no_more_bind_publicly_than_an_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = tmp_path / "open.toml"
    preset.write_text("[serve]\nhost = '::'\n")

    assert run(["serve", "--preset", str(preset), "--config-dir", str(tmp_path)]) == 2
    assert "without an API key" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["192.0.2.7", "0.0.0.0"])
def test_h10_a_name_is_what_it_resolves_to(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    address: str,
) -> None:
    def resolve(*_: object, **__: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)

    assert refuses("localhost", tmp_path, capsys)
    with pytest.raises(PublicBindWithoutKey):
        listen("tower.local", 0, has_keys=False)


@pytest.mark.parametrize("keys", ["revoked", "exposed", "damaged"])
def test_h10_a_file_without_a_usable_key_opens_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: str
) -> None:
    path = tmp_path / FILE_NAME
    create_key(path, "laptop", now=0)
    if keys == "revoked":
        revoke_key(path, "laptop")
    elif keys == "exposed":
        path.chmod(0o644)
    else:
        path.write_text("laptop\n")

    assert run(["serve", "--host", "0.0.0.0", "--config-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_h10_loopback_is_not_reachable_at_another_address() -> None:
    with running(FakeDriver()) as url:
        endpoint = Endpoint(url)
        assert endpoint.ask("GET", "/health").status == 200
        port = int(endpoint.netloc.rpartition(":")[2])
        with pytest.raises(ConnectionError):
            socket.create_connection(("127.0.0.2", port), timeout=10)


@pytest.mark.skipif(sys.platform != "linux", reason="asks for addresses in Linux's way")
def test_h10_another_interface_of_this_machine_is_public() -> None:
    shown = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False)
    for address in shown.stdout.split():
        with pytest.raises(PublicBindWithoutKey):
            listen(address, 0, has_keys=False)
