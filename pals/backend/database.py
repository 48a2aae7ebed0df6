"""Opens the database and brings its schema up to date."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from pals.config import PRIVATE_FILE, PRIVATE_FOLDER
from pals.errors import InvalidConfig, StorageFailed

BUSY_TIMEOUT_S = 10.0
_MIGRATIONS = Path(__file__).parent / "migrations"
_WRITES = "pals_writes"


def sqlite_url(path: Path) -> str:
    """Return the URL of a SQLite file."""
    return URL.create("sqlite", database=str(path)).render_as_string()


def open_database(url: str) -> Engine:
    """Connect, create or migrate the tables, and return the engine.

    Raises:
        InvalidConfig: ``url`` is not one, or the database cannot be opened or migrated.
    """
    shown = "the database URL"
    try:
        parsed = sa.make_url(url)
        shown = parsed.render_as_string(hide_password=True)
        engine = (
            _sqlite_engine(parsed) if parsed.get_backend_name() == "sqlite" else _engine(parsed)
        )
        with engine.begin() as connection:
            _migrate(connection)
    except (SQLAlchemyError, OSError, ImportError) as error:
        raise InvalidConfig(
            source=shown, problem=_reason(error), advice="check the path or URL and its permissions"
        ) from error
    return engine


@contextmanager
def reading(engine: Engine) -> Generator[Connection, None, None]:
    """Run one read-only transaction.

    Raises:
        StorageFailed: The database did not answer in time, or failed.
    """
    with _typed_errors(), engine.begin() as connection:
        yield connection


@contextmanager
def writing(engine: Engine) -> Generator[Connection, None, None]:
    """Run one transaction that writes, commit it, or roll it back on any error.

    Raises:
        StorageFailed: The database did not answer in time, or failed; nothing is written.
    """
    with _typed_errors(), engine.execution_options(**{_WRITES: True}).begin() as connection:
        yield connection


@contextmanager
def _typed_errors() -> Generator[None, None, None]:
    try:
        yield
    except DBAPIError as error:
        raise StorageFailed(problem=_reason(error)) from error


def _engine(url: URL) -> Engine:
    return sa.create_engine(url, hide_parameters=True)


def _sqlite_engine(url: URL) -> Engine:
    if url.database and url.database != ":memory:":
        path = Path(url.database)
        path.parent.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, PRIVATE_FILE))
    engine = sa.create_engine(url, hide_parameters=True, connect_args={"timeout": BUSY_TIMEOUT_S})
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    # The driver's own transaction handling begins late and read-only; _begin_sqlite begins.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later could fail with SQLITE_BUSY half-way.
    writes = cast("bool", connection.get_execution_options().get(_WRITES, False))
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _migrate(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _reason(error: Exception) -> str:
    """Return the driver's own words, without the statement that SQLAlchemy adds."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return str(cause)
