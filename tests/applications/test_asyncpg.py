"""asyncpg: the statements run on it, the loops of the runtime need psycopg and say so."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import URL, Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from checkpoints import (
    AsyncCheckpoints,
    CheckpointRecord,
    CheckpointStatus,
    ReservationLost,
    SchemaNotMigrated,
    SubscriptionExists,
    UnknownSubscription,
)
from checkpoints.runtime import AsyncConsumer, AsyncRecorder, Consumer, Interest, Recorder
from tests.applications import bank
from tests.support.databases import disposed
from tests.support.factories import MINUTE
from tests.support.samples import SAMPLES


def on_asyncpg(url: URL, work: Callable[[AsyncEngine], Awaitable[Any]]) -> Any:
    """Run a coroutine with an engine of asyncpg."""

    async def run() -> Any:
        engine = create_async_engine(url.set(drivername="postgresql+asyncpg"))
        try:
            return await work(engine)
        finally:
            await engine.dispose()

    return asyncio.run(run())


def test_a_session_projects_and_moves_the_position(migrated_url: URL, engine: Engine) -> None:
    subscription_id = bank.found(engine)

    async def work(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session, session.begin():
            await (await session.connection()).run_sync(
                bank.append, subscription_id, "account-1", 70
            )
        async with engine.begin() as connection:
            (held,) = await AsyncCheckpoints(connection).reserve_next_available_checkpoint(
                bank.GROUP, MINUTE
            )
        assert (held.stream_name, held.status) == ("account-1", CheckpointStatus.ACTIVE)
        async with AsyncSession(engine) as session, session.begin():
            await (await session.connection()).run_sync(bank.apply, held)
            await AsyncCheckpoints(session).update_checkpoint_position(held, held.stream_version)

        async def again() -> None:
            async with engine.begin() as connection:
                await connection.run_sync(bank.apply, held)
                await AsyncCheckpoints(connection).update_checkpoint_position(held, 2)

        with pytest.raises(ReservationLost):
            await again()

    on_asyncpg(migrated_url, work)
    assert bank.balance(engine, "account-1") == 70
    bank.assert_sound(engine)


def test_an_error_and_its_retry_go_through_json_and_intervals(
    migrated_url: URL, engine: Engine
) -> None:
    subscription_id = bank.found(engine)
    with engine.begin() as connection:
        bank.append(connection, subscription_id, "account-1", 70)

    async def work(engine: AsyncEngine) -> Any:
        async with engine.begin() as connection:
            checkpoints = AsyncCheckpoints(connection)
            (held,) = await checkpoints.reserve_next_available_checkpoint(bank.GROUP, MINUTE)
            held = await checkpoints.extend_checkpoint_reservation(held, MINUTE * 2)
            await checkpoints.record_checkpoint_error(
                held,
                0,
                status=CheckpointStatus.RETRY,
                retry_attempts=1,
                error={"message": "it was closed"},
                process_at=MINUTE,
            )
            return await checkpoints.get_checkpoint(held.id)

    detail = on_asyncpg(migrated_url, work)
    assert detail.status is CheckpointStatus.RETRY
    assert detail.retries[0]["error"] == {"message": "it was closed"}
    bank.assert_sound(engine)


def test_errors_mean_what_they_mean_with_psycopg(migrated_url: URL, engine: Engine) -> None:
    subscription_id = bank.found(engine)

    async def work(engine: AsyncEngine) -> None:
        with pytest.raises(UnknownSubscription) as unknown:
            async with engine.begin() as connection:
                await AsyncCheckpoints(connection).record_checkpoints(
                    [CheckpointRecord(987654, "account-1", 1)]
                )
        assert unknown.value.subscription_id == 987654
        async with engine.begin() as connection:
            checkpoints = AsyncCheckpoints(connection)
            await checkpoints.add_or_update_subscription(bank.GROUP, "totals")
            await checkpoints.ensure_checkpoint_exists(subscription_id, "account-1")
        with pytest.raises(SubscriptionExists) as exists:
            async with engine.begin() as connection:
                await AsyncCheckpoints(connection).rename_subscription(subscription_id, "totals")
        assert exists.value.name == "totals"
        elsewhere = engine.execution_options(schema_translate_map={"checkpoints": "elsewhere"})
        with pytest.raises(SchemaNotMigrated, match="elsewhere"):
            async with elsewhere.begin() as connection:
                await AsyncCheckpoints(connection).audit_checkpoints()

    on_asyncpg(migrated_url, work)


def test_every_statement_runs(migrated_url: URL, engine: Engine) -> None:
    bank.found(engine)

    async def work(engine: AsyncEngine) -> set[str]:
        executed = set()
        for name, statement in SAMPLES.items():
            async with engine.connect() as connection:
                result = await connection.execute(statement)
            assert list(result.keys()) == statement.selected_columns.keys()
            executed.add(name)
        return executed

    assert on_asyncpg(migrated_url, work) == set(SAMPLES)


@pytest.mark.parametrize("kind", [AsyncConsumer, AsyncRecorder])
def test_the_runtime_refuses_it_and_names_what_it_needs(kind: Any) -> None:
    engine = create_async_engine("postgresql+asyncpg://somebody@nowhere/bank")
    further = ([Interest("balances")],) if kind is AsyncRecorder else ()
    with pytest.raises(ValueError, match=r"not asyncpg.*postgresql\+psycopg://"):
        kind(engine, bank.GROUP, bank.apply_async, *further)


@pytest.mark.parametrize("kind", [Consumer, Recorder])
def test_the_blocking_runtime_refuses_other_drivers_too(kind: Any) -> None:
    with disposed(create_engine("postgresql+asyncpg://somebody@nowhere/bank")) as engine:
        further = ([Interest("balances")],) if kind is Recorder else ()
        with pytest.raises(ValueError, match=r"not asyncpg.*postgresql\+psycopg://"):
            kind(engine, bank.GROUP, bank.apply, *further)
