"""Copies a membership database: a backup while it runs, or a move to another server.

Either reads one snapshot and writes one transaction. A backup is a SQLite file whatever the
source is, so that `pals backend --data FILE` runs on it and `--move-to` brings it back.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from pals.backend import queries, schema
from pals.backend.database import (
    WHOLE_DATABASE,
    open_database,
    shown_url,
    snapshot,
    sqlite_file,
    sqlite_url,
    writing,
)
from pals.errors import InvalidConfig, StorageFailed


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """What a copy holds."""

    swarms: int
    entries: int


def back_up(url: str, file: Path) -> Copied:
    """Write a copy of the database to ``file``: mode 0600, the whole of it or nothing.

    Args:
        url: The database, which may be in use.
        file: Where to; what is there is replaced.

    Raises:
        InvalidConfig: The database cannot be opened, or ``file`` cannot be written.
        StorageFailed: The database failed meanwhile.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
            copy = Path(folder) / file.name
            copied = move(url, sqlite_url(copy))
            os.replace(copy, file)
        _sync_folder(file.parent)
    except OSError as error:
        raise InvalidConfig(
            source=file, problem=str(error), advice="choose another file for `--backup`"
        ) from error
    return copied


def move(source_url: str, target_url: str) -> Copied:
    """Copy every table into a database that holds no swarm yet.

    The backend of the source must not run any more: what it takes meanwhile is not copied.

    Raises:
        InvalidConfig: One of them cannot be opened, or the target holds swarms.
        StorageFailed: One of them failed; the target is as it was.
    """
    _check_there(source_url)
    with (
        _opened(source_url) as source,
        _opened(target_url) as target,
        snapshot(source) as reader,
        writing(target, WHOLE_DATABASE) as writer,
    ):
        count = queries.count_swarms(writer)
        if count:
            raise InvalidConfig(
                source=shown_url(target.url),
                problem=f"it holds {count} swarms already",
                advice="move into an empty database",
            )
        for table in schema.metadata.sorted_tables:
            _copy_table(reader, writer, table)
        return _compared(reader, writer)


def _check_there(url: str) -> None:
    """Raise when a SQLite file would be made only to be copied."""
    file = sqlite_file(url)
    if file is not None and not file.is_file():
        raise InvalidConfig(
            source=file, problem="there is no such file", advice="say where it is with `--data`"
        )


@contextmanager
def _opened(url: str) -> Generator[Engine]:
    engine = open_database(url)
    try:
        yield engine
    finally:
        engine.dispose()


def _copy_table(reader: Connection, writer: Connection, table: sa.Table) -> None:
    # In the order of their keys: SQLite's file is then the same for the same rows.
    query = sa.select(table).order_by(*table.primary_key)
    rows = reader.execution_options(yield_per=queries.BATCH_ROWS).execute(query)
    for batch in rows.mappings().partitions():
        writer.execute(table.insert(), [dict(row) for row in batch])


def _compared(reader: Connection, writer: Connection) -> Copied:
    """Return how much was copied, after a comparison of every entry byte for byte."""
    entries, swarms = 0, set[bytes]()
    pairs = zip_longest(queries.all_entries(reader), queries.all_entries(writer))
    for original, copy in pairs:
        if original is None or original != copy:
            raise StorageFailed(problem=f"entry {entries} of the copy is not the original")
        entries += 1
        swarms.add(original[0])
    return Copied(swarms=len(swarms), entries=entries)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
