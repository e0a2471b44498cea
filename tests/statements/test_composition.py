"""Statements on every kind of connection, and inside the caller's own statement."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, Select, String, func, insert, literal, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from checkpoints import (
    CheckpointRecord,
    record_checkpoints,
    reserve_next_available_checkpoint,
    skip_checkpoints,
    update_checkpoint_position,
)
from checkpoints.tables import checkpoints, subscription_groups
from tests.support.factories import (
    GROUP,
    MINUTE,
    add_checkpoint,
    add_subscription,
    reserve,
    state,
)
from tests.support.samples import SAMPLES

# On an empty database these name a subscription that is not there.
REFUSED = {"record_checkpoints", "ensure_checkpoint_exists"}


@pytest.mark.parametrize("name", SAMPLES)
def test_runs_on_a_connection(connection: Connection, name: str) -> None:
    if name in REFUSED:
        with pytest.raises(IntegrityError):
            connection.execute(SAMPLES[name])
    else:
        result = connection.execute(SAMPLES[name])
        assert list(result.keys()) == SAMPLES[name].selected_columns.keys()
        result.all()


def test_runs_on_sessions_and_asyncio(engine: Engine) -> None:
    statements = [sample for name, sample in SAMPLES.items() if name not in REFUSED]

    async def run_async() -> None:
        async_engine = create_async_engine(engine.url)
        async with async_engine.connect() as connection:
            for statement in statements:
                (await connection.execute(statement)).all()
        async with AsyncSession(async_engine) as session:
            for statement in statements:
                (await session.execute(statement)).all()
        await async_engine.dispose()

    with Session(engine) as session:
        for statement in statements:
            session.execute(statement).all()
    asyncio.run(run_async())


@pytest.mark.parametrize("name", [name for name in SAMPLES if name not in REFUSED])
def test_runs_inside_a_statement_of_the_caller(connection: Connection, name: str) -> None:
    inner = SAMPLES[name].cte("inner_rows")
    assert isinstance(connection.scalar(select(func.count()).select_from(inner)), int)


def test_two_statements_run_in_one(connection: Connection) -> None:
    """A consumer's outbox: what it completes and what it records, in one round trip."""
    subscription = add_subscription(connection)
    add_checkpoint(connection, subscription, "account-1")
    held = reserve(connection)
    completed = update_checkpoint_position(held.id, held.reserved_until, 3).cte("completed")
    recorded = record_checkpoints([CheckpointRecord(subscription, "account-2", 1)]).cte("others")
    row = connection.execute(
        select(completed.c.id, recorded.c.stream_name).select_from(
            completed.join(recorded, literal(True))
        )
    ).one()
    assert tuple(row) == (held.id, "account-2")


def test_rows_feed_an_insert_of_the_caller(connection: Connection) -> None:
    subscription = add_subscription(connection)
    id = add_checkpoint(connection, subscription)
    skipped = skip_checkpoints([id]).cte("skips")
    connection.execute(
        insert(subscription_groups).from_select(
            ["name"], select(literal("skipped ").concat(skipped.c.id.cast(String())))
        )
    )
    names = connection.scalars(select(subscription_groups.c.name)).all()
    assert f"skipped {id}" in names


def test_rolls_back_with_the_callers_transaction(engine: Engine) -> None:
    with engine.begin() as connection:
        id = add_checkpoint(connection, add_subscription(connection))
    with engine.connect() as connection:
        reserve(connection)
        connection.rollback()
        assert state(connection, id).ready is not None


def test_executions_share_one_compiled_text(engine: Engine) -> None:
    texts: list[str] = []
    with engine.begin() as connection:
        add_subscription(connection)
    before = _cached(engine)
    with engine.begin() as connection:
        for group in ("a", "b", GROUP):
            texts.append(_sql(connection, reserve_next_available_checkpoint(group, MINUTE)))
    assert len(set(texts)) == 1
    assert _cached(engine) == before + 1


def test_the_main_table_may_be_joined_by_the_caller(connection: Connection) -> None:
    add_checkpoint(connection, add_subscription(connection))
    claimed = reserve_next_available_checkpoint(GROUP, MINUTE).subquery("mine")
    row = connection.execute(
        select(claimed.c.id, checkpoints.c.created_at).join(
            checkpoints, checkpoints.c.id == claimed.c.id
        )
    ).one()
    assert row.created_at is not None


def _cached(engine: Engine) -> int:
    cache: Any = engine._compiled_cache
    return len(cache)


def _sql(connection: Connection, statement: Select[*tuple[Any, ...]]) -> str:
    context: Any = connection.execute(statement).context
    text: str = context.statement
    return text


def test_one_statement_must_not_stand_twice_in_another(connection: Connection) -> None:
    """SQLAlchemy binds parameters by name: one of the two would silently be the other again.

    Should this test fail, SQLAlchemy has changed, and what the documentation forbids may work.
    """
    subscription = add_subscription(connection)
    for name in ("account-1", "account-2"):
        add_checkpoint(connection, subscription, name)
    first, second = reserve(connection), reserve(connection)
    completed = [
        update_checkpoint_position(held.id, held.reserved_until, 3).cte(f"completed_{held.id}")
        for held in (first, second)
    ]
    rows = connection.execute(
        select(completed[0].c.id, completed[1].c.id).select_from(
            completed[0].join(completed[1], literal(True))
        )
    ).all()
    ((one, other),) = rows
    assert one == other
