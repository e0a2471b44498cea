"""A handler for one stream, without a consumer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    MetaData,
    Table,
    Text,
    insert,
    select,
    text,
)
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from checkpoints import Checkpoints, CheckpointStatus, Reservation, UnknownSubscription
from checkpoints.runtime import Consumer, OutsideTransaction
from checkpoints.tables import checkpoints
from checkpoints.testing import NothingToProcess, process, process_async
from tests.support.factories import (
    FAR_AHEAD,
    GROUP,
    add_checkpoint,
    add_subscription,
    reserve,
    state,
    violations,
)

written = Table("written", MetaData(), Column("stream", Text), Column("version", BigInteger))


@pytest.fixture
def subscription_id(connection: Connection) -> Iterator[int]:
    written.create(connection)
    yield add_subscription(connection)
    assert violations(connection) == []


def write(connection: Connection, reservation: Reservation) -> None:
    values = {"stream": reservation.stream_name, "version": reservation.stream_version}
    connection.execute(insert(written).values(values))


def rows(connection: Connection) -> list[Any]:
    return list(connection.execute(select(written)).all())


def test_it_makes_the_checkpoint_and_moves_it(connection: Connection, subscription_id: int) -> None:
    seen: list[Reservation] = []

    def handler(connection: Connection, reservation: Reservation) -> None:
        seen.append(reservation)
        write(connection, reservation)

    detail = process(connection, handler, subscription_id, "account-1", 3)
    (given,) = seen
    assert (given.id, given.subscription_id) == (detail.id, subscription_id)
    assert (given.subscription_name, given.stream_name) == ("balances", "account-1")
    assert (given.stream_position, given.stream_version) == (0, 3)
    assert given.replay_target_position is None
    assert given.reserved_until > given.process_at
    assert (detail.stream_position, detail.stream_version) == (3, 3)
    assert (detail.process_at, detail.reserved_until) == (None, None)
    assert rows(connection) == [("account-1", 3)]


def test_it_goes_on_from_what_was_recorded(connection: Connection, subscription_id: int) -> None:
    add_checkpoint(connection, subscription_id, version=5, position=2)
    detail = process(connection, lambda *_: 4, subscription_id, "account-1")
    assert (detail.stream_position, detail.stream_version) == (4, 5)
    detail = process(connection, lambda *_: None, subscription_id, "account-1", 7)
    assert (detail.stream_position, detail.stream_version) == (7, 7)


def test_what_the_handler_raises_is_raised_and_all_is_undone(
    connection: Connection, subscription_id: int
) -> None:
    id = add_checkpoint(connection, subscription_id)
    before = state(connection, id)

    def handler(connection: Connection, reservation: Reservation) -> None:
        write(connection, reservation)
        raise KeyError("amount")

    with pytest.raises(KeyError, match="amount"):
        process(connection, handler, subscription_id, "account-1", 9)
    assert rows(connection) == []
    assert state(connection, id) == before


def test_an_error_of_the_database_leaves_the_transaction_usable(
    connection: Connection, subscription_id: int
) -> None:
    def handler(connection: Connection, _: Reservation) -> None:
        connection.execute(text("SELECT 1 / 0"))

    with pytest.raises(Exception, match="division by zero"):
        process(connection, handler, subscription_id, "account-1", 1)
    assert rows(connection) == []


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_handler_must_not_end_the_transaction(
    connection: Connection, subscription_id: int, end: str
) -> None:
    connection.commit()
    with pytest.raises(RuntimeError, match="ended the transaction"):
        process(
            connection,
            lambda connection, _: getattr(connection, end)(),
            subscription_id,
            "account-1",
            1,
        )


def test_an_answer_that_a_consumer_refuses_is_refused(
    connection: Connection, subscription_id: int
) -> None:
    handler: Any = lambda *_: "3"  # noqa: E731
    with pytest.raises(TypeError, match="stream_position"):
        process(connection, handler, subscription_id, "account-1", 3)


def test_without_progress_it_is_ready_again_later(
    connection: Connection, subscription_id: int
) -> None:
    detail = process(connection, lambda *_: 0, subscription_id, "account-1", 3)
    assert detail.stream_position == 0
    assert detail.process_at is not None
    assert detail.process_at > detail.updated_at


def test_neither_the_time_nor_the_status_of_the_subscription_matters(
    connection: Connection, subscription_id: int
) -> None:
    id = add_checkpoint(
        connection, subscription_id, status="retry", retry_attempts=2, process_at=FAR_AHEAD
    )
    Checkpoints(connection).pause_subscription(subscription_id)
    process(connection, write, subscription_id, "account-1")
    assert rows(connection) == [("account-1", 3)]
    left = state(connection, id)
    assert (left.status, left.retry_attempts) == (CheckpointStatus.ACTIVE, 0)


def test_a_handler_outside_a_transaction(connection: Connection, subscription_id: int) -> None:
    seen: list[str] = []

    def call(reservation: Reservation) -> None:
        seen.append(reservation.stream_name)

    handler = OutsideTransaction(call)
    assert process(connection, handler, subscription_id, "account-1", 2).stream_position == 2
    assert seen == ["account-1"]


def test_nothing_to_process(connection: Connection, subscription_id: int) -> None:
    def expect(stream_name: str, match: str, version: int | None = None) -> None:
        with pytest.raises(NothingToProcess, match=match) as raised:
            process(connection, pytest.fail, subscription_id, stream_name, version)  # type: ignore[arg-type]
        assert raised.value.subscription_id == subscription_id
        assert raised.value.stream_name == stream_name

    expect("no-such", "there is no checkpoint")
    add_checkpoint(connection, subscription_id, "done", version=3, position=3)
    expect("done", "its position is 3 and its version is 3")
    expect("done", "its position is 3 and its version is 3", version=2)
    add_checkpoint(connection, subscription_id, "failed", status="failed")
    expect("failed", "it has failed")
    add_checkpoint(connection, subscription_id, "held")
    reserve(connection)
    expect("held", "it is reserved until")
    with pytest.raises(UnknownSubscription):
        process(connection, write, 987654, "account-1", 1)


def test_arguments_are_checked(connection: Connection, engine: Engine) -> None:
    wrong: Any = engine
    with pytest.raises(TypeError, match="connection must be a Connection"):
        process(wrong, write, 1, "account-1", 1)
    with pytest.raises(TypeError, match="handlers must be a function"):
        process(connection, 3, 1, "account-1", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stream_version"):
        process(connection, write, 1, "account-1", -1)

    async def run() -> None:
        with pytest.raises(TypeError, match="must be an AsyncConnection"):
            await process_async(connection, wrong, 1, "account-1", 1)  # type: ignore[arg-type]

    asyncio.run(run())


def test_it_leaves_what_a_consumer_leaves(engine: Engine) -> None:
    """The same handlers, on the same checkpoints, by a consumer and by `process`."""

    def handler(connection: Connection, reservation: Reservation) -> int | None:
        write(connection, reservation)
        return {"all": None, "some": 2, "none": 0}[reservation.stream_name]

    with engine.begin() as connection:
        written.create(connection)
        ids = [add_subscription(connection, name) for name in ("consumer", "process")]
        for id in ids:
            for stream_name in ("all", "some", "none"):
                add_checkpoint(connection, id, stream_name)
    assert Consumer(engine, GROUP, {"consumer": handler}).run_once() == 3
    with engine.begin() as connection:
        for stream_name in ("all", "some", "none"):
            process(connection, handler, ids[1], stream_name)
        by_consumer, by_process = (
            [
                (one.stream_name, one.status, one.stream_position, one.process_at is not None)
                for one in connection.execute(
                    select(checkpoints)
                    .where(checkpoints.c.subscription_id == id)
                    .order_by(checkpoints.c.stream_name)
                )
            ]
            for id in ids
        )
        assert by_process == by_consumer
        assert [position for _, _, position, _ in by_process] == [3, 0, 2]
        assert sorted(rows(connection)) == [
            (name, 3) for name in ("all", "all", "none", "none", "some", "some")
        ]
        assert violations(connection) == []


def test_asyncio(engine: Engine) -> None:
    async def handler(connection: AsyncConnection, reservation: Reservation) -> None:
        await connection.run_sync(write, reservation)
        if reservation.stream_position:
            raise KeyError("amount")

    async def call(reservation: Reservation) -> int:
        return reservation.stream_version - 1

    with engine.begin() as connection:
        written.create(connection)
        id = add_subscription(connection)

    async def run() -> None:
        async_engine = create_async_engine(engine.url)
        async with async_engine.begin() as connection:
            detail = await process_async(connection, handler, id, "account-1", 3)
            assert (detail.stream_position, detail.reserved_until) == (3, None)
            with pytest.raises(KeyError, match="amount"):
                await process_async(connection, handler, id, "account-1", 5)
            assert await connection.run_sync(rows) == [("account-1", 3)]
            detail = await process_async(connection, OutsideTransaction(call), id, "account-1", 5)
            assert detail.stream_position == 4

            async def commit(connection: AsyncConnection, _: Reservation) -> None:
                await connection.commit()

            with pytest.raises(RuntimeError, match="ended the transaction"):
                await process_async(connection, commit, id, "account-1", 6)
        await async_engine.dispose()

    asyncio.run(run())
