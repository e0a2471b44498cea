"""A small event store, a projection and a subscription: what the other examples work on.

As a script, it makes all of it in the database at DATABASE_URL.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Identity,
    MetaData,
    Select,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    func,
    insert,
    select,
)
from sqlalchemy.dialects import postgresql

from alembic import command
from checkpoints import Checkpoints, SubscriptionStatus, alembic_config

GROUP = "accounts"
SUBSCRIPTION = "balances"

metadata = MetaData()

messages = Table(
    "messages",
    metadata,
    Column("global_position", BigInteger, Identity(), primary_key=True),
    Column("stream_name", Text, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("amount", BigInteger, nullable=False),
    UniqueConstraint("stream_name", "version"),
)

balances = Table(
    "balances",
    metadata,
    Column("stream_name", Text, primary_key=True),
    Column("amount", BigInteger, nullable=False),
)


@dataclass(frozen=True)
class Message:
    """A message: an account's balance changes by an amount."""

    global_position: int
    stream_name: str
    version: int
    amount: int


def append(connection: Connection, stream_name: str, *amounts: int) -> int:
    """Append messages to a stream; its new version."""
    # One writer at a time: global positions are then visible in order, without gaps to come.
    connection.execute(select(func.pg_advisory_xact_lock(1)))
    last = select(func.coalesce(func.max(messages.c.version), 0)).where(
        messages.c.stream_name == stream_name
    )
    version: int = connection.execute(last).scalar_one()
    for amount in amounts:
        version += 1
        connection.execute(
            insert(messages).values(stream_name=stream_name, version=version, amount=amount)
        )
    return version


def stream(stream_name: str, after: int, limit: int = 500) -> Select[*tuple[Any, ...]]:
    """The messages of a stream past a position."""
    return (
        select(messages)
        .where(messages.c.stream_name == stream_name, messages.c.version > after)
        .order_by(messages.c.version)
        .limit(limit)
    )


def read(connection: Connection, stream_name: str, after: int, limit: int = 500) -> list[Message]:
    """Read the messages of a stream past a position."""
    return [Message(*row) for row in connection.execute(stream(stream_name, after, limit))]


def read_all(connection: Connection, after: int, limit: int = 1000) -> list[Message]:
    """Read the messages of all streams past a global position, in order."""
    statement = (
        select(messages)
        .where(messages.c.global_position > after)
        .order_by(messages.c.global_position)
        .limit(limit)
    )
    return [Message(*row) for row in connection.execute(statement)]


def added(stream_name: str, received: Sequence[Message]) -> postgresql.Insert:
    """What applies messages to the balance of an account.

    It adds up, so that a message applied twice would show.
    """
    amount = sum(message.amount for message in received)
    statement = postgresql.insert(balances).values(stream_name=stream_name, amount=amount)
    return statement.on_conflict_do_update(
        index_elements=["stream_name"], set_={"amount": balances.c.amount + amount}
    )


def apply(connection: Connection, stream_name: str, received: Sequence[Message]) -> None:
    """The handler: apply messages to the balance of an account."""
    connection.execute(added(stream_name, received))


def balance(connection: Connection, stream_name: str) -> int | None:
    """Read the balance of an account; None: nothing was applied."""
    statement = select(balances.c.amount).where(balances.c.stream_name == stream_name)
    return connection.execute(statement).scalar_one_or_none()


def main() -> None:
    """Make the tables and an active subscription."""
    url = os.environ["DATABASE_URL"]
    command.upgrade(alembic_config(url), "head")
    engine = create_engine(url)
    metadata.create_all(engine)
    with engine.begin() as connection:
        checkpoints = Checkpoints(connection)
        subscription = checkpoints.add_or_update_subscription(GROUP, SUBSCRIPTION)
        checkpoints.set_subscription_status(subscription.id, SubscriptionStatus.ACTIVE)
    engine.dispose()


if __name__ == "__main__":
    main()
