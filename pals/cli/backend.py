"""`pals backend`: run the membership service, or copy its database."""

from __future__ import annotations

import ipaddress
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter, validators

from pals import config
from pals.cli import console
from pals.cli.door import Doorway, announce_door, door_beside
from pals.cli.logs import LogFormat, configure_logs
from pals.cli.options import ConfigDir, Json
from pals.errors import InvalidConfig, SecretOnCommandLine

if TYPE_CHECKING:
    from pals.api.server import Listener
    from pals.backend.service import BackendService

DATABASE_NAME = "backend.db"
KEY_NAME = "backend.key"


def backend(
    *,
    host: str | None = None,
    port: int | None = None,
    data: Path | None = None,
    database_url: str | None = None,
    key_file: Path | None = None,
    public_name: str | None = None,
    p2p_port: Annotated[
        int | None, Parameter(validator=validators.Number(gte=0, lte=65535))
    ] = None,
    announce: tuple[str, ...] = (),
    trusted_proxy: tuple[str, ...] = (),
    log_format: LogFormat = "text",
    backup: Path | None = None,
    move_to: str | None = None,
    preset: str | None = None,
    config_dir: ConfigDir = None,
    json: Json = False,
) -> None:
    """Run the membership backend until it is interrupted, or copy its database.

    It stores hashes, public keys and signed records, and can add nobody by itself.

    Args:
        host: Address to listen on; the preset's when left out.
        port: Port to listen on, 0 for a free one; the preset's when left out.
        data: SQLite file; `backend.db` in the profile folder when left out.
        database_url: PostgreSQL instead, `postgresql://USER@HOST/NAME`, or a private file with
            such a URL. With a password only in the file or in `PALS_DATABASE_URL`.
        key_file: Key that signs how new the list is, made on the first start; `backend.key`
            beside the SQLite file or in the profile folder when left out.
        public_name: Also answer under this `Host`, such as `pals.example.org`, or the
            address at which a router forwards to it.
        p2p_port: Also let machines join over libp2p at this port, 0 for a free one.
        announce: Multiaddr at which a port forward leads there, such as
            `/ip4/203.0.113.7/tcp/8471`.
        trusted_proxy: Address of a proxy whose `X-Forwarded-For` is believed.
        log_format: How to log on standard error.
        backup: Write a copy of the database to this file, also while it is in use, and end.
        move_to: Copy the database into this empty one, a URL or a private file with one, and
            end. Stop the backend first.
        preset: Name or file of a preset.
        config_dir: Profile folder.
        json: Print one JSON document a line on standard output.
    """
    profile = config.config_dir(config_dir)
    file = data or profile / DATABASE_NAME
    url = _database_url(database_url, file.absolute(), is_given=data is not None)
    if backup is not None or move_to is not None:
        _copy(url, backup, move_to, as_json=json)
        return
    proxies = frozenset(_address(proxy) for proxy in trusted_proxy)
    folder = (file.parent if url.startswith("sqlite") else profile).absolute()
    doorway = Doorway(folder=folder, port=p2p_port, announced=announce)
    with (
        _listening(preset, host, port) as listener,
        _opened(url, (key_file or folder / KEY_NAME).absolute(), log_format) as service,
    ):
        _serve(service, listener, public_name, proxies, doorway, as_json=json)


@contextmanager
def _listening(preset: str | None, host: str | None, port: int | None) -> Generator[Listener]:
    """Listen where the command line says, else where the preset does."""
    # The HTTP stack takes half a second to import, which no other command should pay.
    from pals.api.server import listen_anywhere

    settings = config.load_settings(preset).backend
    listener = listen_anywhere(
        settings.host if host is None else host, settings.port if port is None else port
    )
    with listener.socket:
        yield listener


@contextmanager
def _opened(url: str, key_file: Path, log_format: LogFormat) -> Generator[BackendService]:
    from pals.backend.key_file import load_or_create_key
    from pals.backend.service import BackendService

    signer = load_or_create_key(key_file)
    configure_logs(log_format)
    with closing(BackendService(url, signer=signer)) as service:
        yield service


def _serve(
    service: BackendService,
    listener: Listener,
    public_name: str | None,
    proxies: frozenset[str],
    doorway: Doorway,
    *,
    as_json: bool,
) -> None:
    from pals.api.gate import GateSettings
    from pals.api.membership import build_membership_app
    from pals.api.server import HttpServer
    from pals.backend.limiter import BackendLimiter
    from pals.cli.interrupt import exiting_on_termination

    names = () if public_name is None else (public_name,)
    gate = GateSettings.for_bind(listener.host, listener.port, hosts=names)

    def announce_ready(url: str) -> None:
        if as_json:
            console.json({"schema": 1, "event": "ready", "url": url})
        else:
            console.out(f"listening on {url}")

    limiter = BackendLimiter()
    app = build_membership_app(service, gate=gate, limiter=limiter, proxies=proxies)
    server = HttpServer(app, listener, on_ready=announce_ready)
    door = door_beside(doorway, service, limiter, on_crash=server.stop)
    with exiting_on_termination(), door as addresses:
        announce_door(addresses, as_json=as_json)
        server.run()


def _copy(url: str, backup: Path | None, move_to: str | None, *, as_json: bool) -> None:
    from pals.backend.transfer import back_up, move

    if backup is not None and move_to is not None:
        raise InvalidConfig(
            source="`--backup` and `--move-to`", problem="they exclude each other", advice="use one"
        )
    if backup is not None:
        copied, target = back_up(url, backup.absolute()), str(backup)
    else:
        assert move_to is not None
        copied, target = move(url, _url_in(move_to, "--move-to", "PGPASSWORD")), "the new database"
    if as_json:
        console.json({"schema": 1, "swarms": copied.swarms, "records": copied.entries})
    else:
        console.out(f"copied {copied.swarms} swarms with {copied.entries} records to {target}")


def _database_url(option: str | None, file: Path, *, is_given: bool) -> str:
    from pals.backend.database import sqlite_url

    variable = config.take_environment(config.DATABASE_URL_VARIABLE)
    if is_given and option is not None:
        raise InvalidConfig(
            source="`--data` and `--database-url`",
            problem="both say where the database is",
            advice="use one",
        )
    if option is not None:
        return _url_in(option, "--database-url", config.DATABASE_URL_VARIABLE)
    return sqlite_url(file) if is_given or variable is None else variable


def _url_in(text: str, option: str, variable: str) -> str:
    """Return a URL without a password, or the one in a private file.

    Raises:
        SecretOnCommandLine: The URL has a password, which other users can read.
    """
    from pals.backend.database import has_password

    if "://" not in text:
        return config.read_private(Path(text)).decode(errors="replace").strip()
    if has_password(text):
        raise SecretOnCommandLine(name=f"the password in `{option}`", variable=variable)
    return text


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError as error:
        raise InvalidConfig(
            source=f"the proxy `{text}`",
            problem="it is not an address",
            advice="give its IP address, such as `127.0.0.1`",
        ) from error
