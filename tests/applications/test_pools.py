"""psycopg's own pool, behind an engine that pools nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress

import pytest
from psycopg_pool import AsyncConnectionPool, ConnectionPool
from sqlalchemy import URL, Engine, NullPool, create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from checkpoints import Reservation
from checkpoints.runtime import AsyncConsumer, Consumer
from tests.applications import bank


def conninfo(url: URL) -> str:
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


@pytest.fixture
def pool(migrated_url: URL) -> Iterator[ConnectionPool]:
    with ConnectionPool(
        conninfo(migrated_url), min_size=2, max_size=8, close_returns=True, open=True
    ) as made:
        yield made


@pytest.fixture
def pooled(pool: ConnectionPool) -> Engine:
    return create_engine("postgresql+psycopg://", creator=pool.getconn, poolclass=NullPool)


def states(pool: ConnectionPool) -> list[tuple[bool, int]]:
    """Of each connection in the pool: whether it is in autocommit, and how much it listens to."""
    taken = [pool.getconn() for _ in range(pool.get_stats()["pool_available"])]
    found = []
    for connection in taken:
        row = connection.execute("SELECT count(*) FROM pg_listening_channels()").fetchone()
        assert row is not None
        found.append((connection.autocommit, row[0]))
        connection.rollback()
    for connection in taken:
        pool.putconn(connection)
    return found


def test_a_consumer_works_on_the_pool_of_psycopg(
    pool: ConnectionPool, pooled: Engine, engine: Engine
) -> None:
    subscription_id = bank.found(pooled)
    consumer = Consumer(pooled, bank.GROUP, bank.apply, concurrency=2)
    with bank.running(consumer):
        for amount in (100, -30):
            with pooled.begin() as connection:
                bank.append(connection, subscription_id, "account-1", amount)
        bank.until(lambda: bank.balance(engine, "account-1") == 70, "both are applied")
    bank.assert_sound(engine)
    # All came back.
    assert pool.get_stats()["pool_available"] == pool.get_stats()["pool_size"]


def test_what_listened_goes_back_as_it_was_taken(
    pool: ConnectionPool, pooled: Engine, engine: Engine
) -> None:
    # In autocommit, the next handler would write in one transaction and move in another.
    subscription_id = bank.found(pooled)
    consumer = Consumer(pooled, bank.GROUP, bank.apply)
    with bank.running(consumer):
        with engine.begin() as connection:
            bank.append(connection, subscription_id, "account-1", 1)
        bank.until(lambda: bank.balance(engine, "account-1") == 1, "it is applied")
        bank.until(lambda: listeners(engine), "it listens")
    assert states(pool)
    assert set(states(pool)) == {(False, 0)}


def test_what_listened_in_a_loop_goes_back_as_it_was_taken(
    migrated_url: URL, engine: Engine
) -> None:
    subscription_id = bank.found(engine)
    with engine.begin() as connection:
        bank.append(connection, subscription_id, "account-1", 5)

    async def work() -> set[bool]:
        async with AsyncConnectionPool(
            conninfo(migrated_url), min_size=2, max_size=8, close_returns=True, open=False
        ) as pool:
            pooled = create_async_engine(
                "postgresql+psycopg://", async_creator=pool.getconn, poolclass=NullPool
            )
            consumer = AsyncConsumer(pooled, bank.GROUP, bank.apply_async)
            run = asyncio.create_task(consumer.run(handle_signals=False))
            async with asyncio.timeout(bank.DEADLINE):
                while not listeners(engine) or bank.balance(engine, "account-1") != 5:
                    await asyncio.sleep(0.01)
            consumer.stop()
            await run
            taken = [await pool.getconn() for _ in range(pool.get_stats()["pool_available"])]
            autocommits = {connection.autocommit for connection in taken}
            for connection in taken:
                await pool.putconn(connection)
            return autocommits

    assert asyncio.run(work()) == {False}


def listeners(engine: Engine) -> int:
    with engine.connect() as connection:
        row = connection.exec_driver_sql(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND query LIKE 'LISTEN%%'"
        )
        return int(row.scalar_one())


def test_a_handler_that_raises_leaves_the_pool_whole(
    pool: ConnectionPool, pooled: Engine, engine: Engine
) -> None:
    subscription_id = bank.found(pooled)
    with pooled.begin() as connection:
        bank.append(connection, subscription_id, "account-1", 1)

    def fails(_connection: object, reservation: Reservation) -> None:
        raise LookupError(reservation.stream_name)

    with suppress(LookupError):
        assert Consumer(pooled, bank.GROUP, fails).drain() == 0
    assert bank.balance(engine, "account-1") is None
    assert pool.get_stats()["pool_available"] == pool.get_stats()["pool_size"]
    bank.assert_sound(engine)
