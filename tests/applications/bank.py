"""What the applications have in common: an event store, a projection, and a subscription."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import BigInteger, Column, Connection, Engine, MetaData, Table, Text, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from checkpoints import CheckpointRecord, Checkpoints, Reservation, SubscriptionStatus
from checkpoints.runtime import Consumer
from tests.support.factories import violations

GROUP = "accounts"
DEADLINE = 15.0

metadata = MetaData()

messages = Table(
    "messages",
    metadata,
    Column("stream_name", Text, primary_key=True),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("amount", BigInteger, nullable=False),
)

balances = Table(
    "balances",
    metadata,
    Column("stream_name", Text, primary_key=True),
    Column("amount", BigInteger, nullable=False),
)


def found(engine: Engine) -> int:
    """Make the tables and an active subscription; its id."""
    metadata.create_all(engine)
    with engine.begin() as connection:
        checkpoints = Checkpoints(connection)
        subscription = checkpoints.add_or_update_subscription(GROUP, "balances")
        checkpoints.set_subscription_status(subscription.id, SubscriptionStatus.ACTIVE)
        return subscription.id


def append(connection: Connection, subscription_id: int, stream_name: str, amount: int) -> int:
    """Append a message and record that, in the caller's transaction; its version."""
    version: int = connection.execute(
        select(func.coalesce(func.max(messages.c.version), 0) + 1).where(
            messages.c.stream_name == stream_name
        )
    ).scalar_one()
    connection.execute(
        insert(messages).values(stream_name=stream_name, version=version, amount=amount)
    )
    Checkpoints(connection).record_checkpoints(
        [CheckpointRecord(subscription_id, stream_name, version)]
    )
    return version


def apply(connection: Connection, reservation: Reservation) -> None:
    """The handler: add what is new in a stream to its balance."""
    added = connection.execute(
        select(func.sum(messages.c.amount)).where(
            messages.c.stream_name == reservation.stream_name,
            messages.c.version > reservation.stream_position,
            messages.c.version <= reservation.stream_version,
        )
    ).scalar_one()
    new = insert(balances).values(stream_name=reservation.stream_name, amount=added)
    connection.execute(
        new.on_conflict_do_update(
            index_elements=[balances.c.stream_name],
            set_={"amount": balances.c.amount + new.excluded.amount},
        )
    )


async def apply_async(connection: AsyncConnection, reservation: Reservation) -> None:
    """The handler, for asyncio."""
    await connection.run_sync(apply, reservation)


def balance(engine: Engine, stream_name: str) -> int | None:
    """What was applied."""
    with engine.connect() as connection:
        return connection.scalar(
            select(balances.c.amount).where(balances.c.stream_name == stream_name)
        )


def until(condition: Callable[[], Any], what: str) -> None:
    """Wait for it, but not for long."""
    ends = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < ends, f"not within {DEADLINE} s: {what}"
        time.sleep(0.01)


def assert_sound(engine: Engine) -> None:
    """The rule holds."""
    with engine.connect() as connection:
        assert violations(connection) == []


@contextmanager
def running(consumer: Consumer) -> Iterator[None]:
    """Run a consumer in a thread beside, and stop it in order."""
    thread = threading.Thread(target=consumer.run, name="consumer")
    thread.start()
    try:
        yield
    finally:
        consumer.stop()
        thread.join(DEADLINE)
        assert not thread.is_alive()
