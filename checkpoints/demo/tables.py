"""The tables of the demonstration, beside the toolkit's, in a schema of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import (
    URL,
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    Engine,
    FromClause,
    Identity,
    Index,
    MetaData,
    Table,
    Text,
    create_engine,
    text,
)

from checkpoints.runtime import XID8
from checkpoints.tables import DEFAULT_SCHEMA

__all__ = [
    "GROUP",
    "SCHEMA",
    "authors",
    "copy_rows",
    "demo_engine",
    "lines",
    "messages",
    "metadata",
    "recount",
]

SCHEMA = "checkpoints_demo"
GROUP = "demo"

metadata = MetaData(schema=SCHEMA)

# As `checkpoints.runtime.reading` wants it, for a recorder to read it in order; without the trigger
# there, for both subscriptions start at the beginning.
messages = Table(
    "messages",
    metadata,
    Column("global_position", BigInteger, Identity(), nullable=False),
    Column("transaction_id", XID8, server_default=text("pg_current_xact_id()"), nullable=False),
    Column("stream_name", Text, primary_key=True),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("type", Text, nullable=False),
    Column("commit", Text, nullable=False),
    Column("author", Text, nullable=False),
    Column("added", BigInteger),
    Column("deleted", BigInteger),
    Index("messages_in_order", "transaction_id", "global_position"),
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


def copy_rows(
    connection: Connection,
    table: FromClause,
    columns: Iterable[ColumnElement[Any]],
    rows: Iterable[Sequence[Any]],
) -> None:
    """Insert rows with COPY, in the transaction of the connection."""
    preparer = connection.dialect.identifier_preparer
    names = ", ".join(preparer.format_column(column) for column in columns)
    cursor = connection.connection.cursor()
    try:
        with cursor.copy(f"COPY {preparer.format_table(table)} ({names}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
    finally:
        cursor.close()
