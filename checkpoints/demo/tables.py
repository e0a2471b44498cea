"""The tables of the demonstration, beside the toolkit's, in a schema of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import (
    URL,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Engine,
    FromClause,
    Identity,
    Integer,
    MetaData,
    Table,
    Text,
    create_engine,
)

from checkpoints.tables import DEFAULT_SCHEMA

__all__ = [
    "GROUP",
    "SCHEMA",
    "authors",
    "copy_rows",
    "demo_engine",
    "incidents",
    "lines",
    "messages",
    "metadata",
    "recount",
]

SCHEMA = "checkpoints_demo"
GROUP = "demo"

metadata = MetaData(schema=SCHEMA)

messages = Table(
    "messages",
    metadata,
    Column("stream_name", Text, primary_key=True),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("commit", Text, nullable=False),
    Column("author", Text, nullable=False),
    Column("added", BigInteger),
    Column("deleted", BigInteger),
    Column("binary", Boolean, nullable=False),
)

# The projections count up, so that a message applied twice, or not at all, shows.
lines = Table(
    "lines",
    metadata,
    Column("stream_name", Text, primary_key=True),
    Column("changes", BigInteger, nullable=False),
    Column("added", BigInteger, nullable=False),
    Column("deleted", BigInteger, nullable=False),
    Column("binaries", BigInteger, nullable=False),
    # Messages applied in the wrong order show here.
    Column("last_commit", Text, nullable=False),
)

# Keyed by stream too: one row per author would make the workers wait for each other.
authors = Table(
    "authors",
    metadata,
    Column("author", Text, primary_key=True),
    Column("stream_name", Text, primary_key=True),
    Column("changes", BigInteger, nullable=False),
    Column("added", BigInteger, nullable=False),
    Column("deleted", BigInteger, nullable=False),
    Column("binaries", BigInteger, nullable=False),
)

# What went wrong and was mended: kind is 'error', 'lost' or 'recovered'.
incidents = Table(
    "incidents",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    Column("kind", Text, nullable=False),
    Column("count", Integer, nullable=False),
)

# What git says, counted again for the verdict; it is empty outside of its transaction.
recount = Table(
    "recount",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("commit", Text, nullable=False),
    Column("author", Text, nullable=False),
    Column("stream_name", Text, nullable=False),
    Column("added", BigInteger),
    Column("deleted", BigInteger),
)


def demo_engine(url: URL, *, pool_size: int = 1, application_name: str = "checkpoints") -> Engine:
    """An engine whose statements of the toolkit go to the schema of the demonstration."""
    return create_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        connect_args={"application_name": application_name, "client_encoding": "utf8"},
        execution_options={"schema_translate_map": {DEFAULT_SCHEMA: SCHEMA}},
    )


def copy_rows(connection: Connection, table: FromClause, rows: Iterable[tuple[Any, ...]]) -> int:
    """Insert rows with COPY, in the transaction of the connection; the number of rows."""
    preparer = connection.dialect.identifier_preparer
    columns = ", ".join(preparer.format_column(column) for column in table.columns)
    count = 0
    cursor = connection.connection.cursor()
    try:
        target = preparer.format_table(table)
        with cursor.copy(f"COPY {target} ({columns}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
                count += 1
    finally:
        cursor.close()
    return count
