"""`pals backend`: run the membership service."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

from pals import config
from pals.cli import console
from pals.cli.options import ConfigDir, Json

DATABASE_NAME = "backend.db"


def backend(
    *,
    host: str | None = None,
    port: int | None = None,
    data: Path | None = None,
    public_name: str | None = None,
    preset: str | None = None,
    config_dir: ConfigDir = None,
    json: Json = False,
) -> None:
    """Run the membership backend until it is interrupted.

    It stores hashes, public keys and signed records, and can add nobody by itself.

    Args:
        host: Address to listen on; the preset's when left out.
        port: Port to listen on, 0 for a free one; the preset's when left out.
        data: SQLite file; `backend.db` in the profile folder when left out.
        public_name: Also answer under this `Host`, such as `pals.example.org`.
        preset: Name or file of a preset.
        config_dir: Profile folder.
        json: Print one JSON document a line on standard output.
    """
    # The HTTP stack takes half a second to import, which no other command should pay.
    from pals.api.gate import GateSettings
    from pals.api.membership import build_membership_app
    from pals.api.server import HttpServer, listen_anywhere
    from pals.backend.database import sqlite_url
    from pals.backend.service import BackendService
    from pals.cli.interrupt import exiting_on_termination

    settings = config.load_settings(preset).backend
    file = data or config.config_dir(config_dir) / DATABASE_NAME
    listener = listen_anywhere(
        settings.host if host is None else host, settings.port if port is None else port
    )
    gate = GateSettings.for_bind(listener.host, listener.port)
    if public_name is not None:
        gate = replace(gate, hosts=gate.hosts | {public_name.lower()})
    service = BackendService(sqlite_url(file.absolute()))

    def announce_ready(url: str) -> None:
        if json:
            console.json({"schema": 1, "event": "ready", "url": url})
        else:
            console.out(f"listening on {url}")

    with exiting_on_termination(), closing(service):
        app = build_membership_app(service, gate=gate)
        HttpServer(app, listener, on_ready=announce_ready).run()
