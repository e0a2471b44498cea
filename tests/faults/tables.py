"""Messages, and the projections that the workers make of them."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Identity, Integer, MetaData, Table, Text, text

from checkpoints.runtime.reading import XID8, MessageTable

__all__ = ["messages", "metadata", "read_messages", "shared", "totals"]

metadata = MetaData(schema="faults")

messages = Table(
    "messages",
    metadata,
    Column("global_position", BigInteger, Identity(always=True), primary_key=True),
    Column("transaction_id", XID8, nullable=False, server_default=text("pg_current_xact_id()")),
    Column("stream_name", Text, nullable=False, index=True),
    Column("stream_position", BigInteger, nullable=False),
    # How the handler misbehaves when it meets the message, "plain" is not at all…
    Column("type", Text, nullable=False),
    # … while the checkpoint has had fewer attempts than these.
    Column("times", Integer, nullable=False),
    Column("amount", BigInteger, nullable=False),
)

# Counts up, so that a message applied twice, or not at all, shows.
totals = Table(
    "totals",
    metadata,
    Column("stream_name", Text, primary_key=True),
    Column("messages", BigInteger, nullable=False),
    Column("amount", BigInteger, nullable=False),
    # A hash over all positions in the order in which they were applied.
    Column("chain", Text, nullable=False),
)

# Rows that many streams touch.
shared = Table(
    "shared",
    metadata,
    Column("key", Integer, primary_key=True),
    Column("messages", BigInteger, nullable=False),
)

read_messages = MessageTable(
    global_position=messages.c.global_position,
    transaction_id=messages.c.transaction_id,
    stream_name=messages.c.stream_name,
    stream_position=messages.c.stream_position,
    type=messages.c.type,
)
