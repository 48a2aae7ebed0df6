"""Opens the database and brings its schema up to date.

SQLite locks the whole file for a writer (``BEGIN IMMEDIATE``). On PostgreSQL a writer first
takes an advisory lock on what it changes: two writers of one swarm run one after another,
each sees what the one before it committed (``READ COMMITTED``), and nothing has to be
retried.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from pals.config import PRIVATE_FILE, PRIVATE_FOLDER
from pals.errors import InvalidConfig, MissingExtra, StorageFailed

BUSY_TIMEOUT_S = 10
CONNECT_TIMEOUT_S = 5
SQLITE, POSTGRES = "sqlite", "postgresql"
WHOLE_DATABASE = b""
_MIGRATIONS = Path(__file__).parent / "migrations"
_NEWEST = "head"
_WRITES = "pals_writes"
_SCHEMA_LOCK = b"schema"
_SESSION = (
    # A server may be set up to acknowledge what a crash then loses.
    "SET synchronous_commit = on",
    f"SET lock_timeout = '{BUSY_TIMEOUT_S}s'",
    f"SET statement_timeout = '{BUSY_TIMEOUT_S}s'",
    f"SET idle_in_transaction_session_timeout = '{BUSY_TIMEOUT_S}s'",
)


def sqlite_url(path: Path) -> str:
    """Return the URL of a SQLite file."""
    return URL.create(SQLITE, database=str(path)).render_as_string()


def sqlite_file(url: str) -> Path | None:
    """Return the file of a SQLite database, or None for any other URL."""
    try:
        parsed = sa.make_url(url)
    except SQLAlchemyError:
        return None
    if parsed.get_backend_name() != SQLITE or not parsed.database:
        return None
    return Path(parsed.database)


def has_password(url: str) -> bool:
    """Return whether a database URL holds a password, which no command line may show."""
    try:
        parsed = sa.make_url(url)
    except SQLAlchemyError:
        return False
    return parsed.password is not None or "password" in parsed.query


def shown_url(url: URL) -> str:
    """Return where a database is, without its password or any option."""
    return url.set(query={}).render_as_string(hide_password=True)


def open_database(url: str, *, revision: str = _NEWEST) -> Engine:
    """Connect, create or migrate the tables, and return the engine.

    Args:
        url: A SQLAlchemy URL of SQLite or PostgreSQL.
        revision: Version of the tables; any but the newest is for tests of migrations.

    Raises:
        InvalidConfig: ``url`` is not one, or the database cannot be opened or migrated.
        MissingExtra: It is one of PostgreSQL, whose driver is not installed.
    """
    shown = "the database URL"
    try:
        parsed = sa.make_url(url)
        shown = shown_url(parsed)
        engine = _engine(parsed)
        with engine.execution_options(**{_WRITES: True}).begin() as connection:
            _lock(connection, _SCHEMA_LOCK)
            _migrate(connection, revision)
    except ModuleNotFoundError as error:
        raise MissingExtra(package=error.name, extra="postgres") from error
    except (SQLAlchemyError, OSError, CommandError) as error:
        raise InvalidConfig(
            source=shown,
            problem=_reason(error),
            advice="check the path or URL, its permissions, and that the server runs",
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
def writing(engine: Engine, lock: bytes) -> Generator[Connection, None, None]:
    """Run one transaction that writes, commit it, or roll it back on any error.

    Args:
        engine: The database.
        lock: What is changed: a swarm's id, or `WHOLE_DATABASE`. Nobody else who names the
            same writes at the same time.

    Raises:
        StorageFailed: The database did not answer in time, or failed. When it failed in the
            last moment nobody knows whether it wrote: whoever asked must repeat it.
    """
    with _typed_errors(), engine.execution_options(**{_WRITES: True}).begin() as connection:
        _lock(connection, lock)
        yield connection


@contextmanager
def snapshot(engine: Engine) -> Generator[Connection, None, None]:
    """Run a long read-only transaction in which nothing changes.

    Raises:
        StorageFailed: The database failed.
    """
    postgres = engine.dialect.name == POSTGRES
    # SQLite's transactions are snapshots as they are.
    options = {"isolation_level": "REPEATABLE READ"} if postgres else {}
    with _typed_errors(), engine.execution_options(**options).begin() as connection:
        if postgres:
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        yield connection


@contextmanager
def _typed_errors() -> Generator[None, None, None]:
    try:
        yield
    except SQLAlchemyError as error:
        raise StorageFailed(problem=_reason(error)) from error


def _engine(url: URL) -> Engine:
    match url.get_backend_name():
        case "sqlite":
            return _sqlite_engine(url)
        case "postgresql":
            return _postgres_engine(url)
        case other:
            raise ArgumentError(f"`{other}` is neither `sqlite` nor `postgresql`")


def _postgres_engine(url: URL) -> Engine:
    arguments = {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "tcp_user_timeout": BUSY_TIMEOUT_S * 1000,
        "application_name": "pals",
        "client_encoding": "utf8",
    }
    engine = sa.create_engine(
        url.set(drivername="postgresql+psycopg"),
        hide_parameters=True,
        isolation_level="READ COMMITTED",
        # A connection that the server closed, as on its restart, is replaced unnoticed.
        pool_pre_ping=True,
        pool_timeout=BUSY_TIMEOUT_S,
        connect_args={key: value for key, value in arguments.items() if key not in url.query},
    )
    event.listen(engine, "connect", _prepare_postgres)
    return engine


def _prepare_postgres(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    connection.autocommit = True
    cursor = connection.cursor()
    for statement in _SESSION:
        cursor.execute(statement)
    cursor.close()
    connection.autocommit = False


def _lock(connection: Connection, what: bytes) -> None:
    """Wait on PostgreSQL until nobody else holds ``what``; it is held until the commit."""
    if connection.dialect.name == POSTGRES:
        number = int.from_bytes(hashlib.sha256(what).digest()[:8], "big", signed=True)
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(number)))


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


def _migrate(connection: Connection, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


def _reason(error: Exception) -> str:
    """Return the driver's own words, without the statement that SQLAlchemy adds."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return str(cause).strip().partition("\n")[0]
