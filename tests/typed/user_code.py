"""What an application writes, and the types that it is to get: checked, and not run.

`test_types.py` has mypy and pyright check it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from datetime import datetime, timedelta
from typing import assert_type

from sqlalchemy import URL, BigInteger, Column, Connection, Engine, MetaData, Row, Table, Text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

import checkpoints as c
from checkpoints import (
    AsyncCheckpoints,
    CheckpointDetail,
    CheckpointPosition,
    CheckpointRecord,
    Checkpoints,
    CheckpointStatus,
    CheckpointViolation,
    ExpiredReservation,
    JSONValue,
    ListedCheckpoint,
    ListedReservation,
    LockedCheckpoint,
    PositionUpdate,
    RecordedCheckpoint,
    Reservation,
    Subscription,
    SubscriptionMetrics,
    SubscriptionStatus,
    migrations,
)
from checkpoints.embedded import EmbeddedServer, available_majors, start_server
from checkpoints.runtime import (
    XID8,
    AsyncConsumer,
    AsyncRecorder,
    Consumer,
    Interest,
    Message,
    MessageTable,
    OutsideTransaction,
    Position,
    Recorder,
    RetryPolicy,
)
from checkpoints.testing import process, process_async

TIMEOUT = timedelta(seconds=30)


# --- rows of the statements, on a connection


def consumer_rows(connection: Connection, token: datetime) -> None:
    reserved = connection.execute(c.reserve_next_available_checkpoint("group", TIMEOUT)).one()
    id, subscription_id, name, stream, position, version, attempts, status, target, until, due = (
        reserved
    )
    assert_type(id, int)
    assert_type(subscription_id, int)
    assert_type(name, str)
    assert_type(stream, str)
    assert_type(position, int)
    assert_type(version, int)
    assert_type(attempts, int)
    assert_type(status, CheckpointStatus)
    assert_type(target, int | None)
    assert_type(until, datetime)
    assert_type(due, datetime)
    assert_type(
        connection.execute(c.get_next_process_at("group")).all(),
        Sequence[Row[int, datetime, timedelta]],
    )
    assert_type(
        connection.execute(c.update_checkpoint_position(1, token, 3)).one(), Row[int, int, int]
    )
    updates = [PositionUpdate(1, token, 3, TIMEOUT)]
    assert_type(
        connection.execute(c.update_checkpoint_positions(updates)).all(),
        Sequence[Row[int, int, int]],
    )
    recorded = connection.execute(
        c.record_checkpoint_error(
            1,
            token,
            3,
            status=CheckpointStatus.RETRY,
            retry_attempts=1,
            error={"type": "KeyError", "values": [1, None, 2.5]},
            process_at=TIMEOUT,
        )
    ).one()
    assert_type(recorded, Row[int, CheckpointStatus])
    assert_type(connection.scalars(c.release_checkpoint_reservation(1, token)).all(), Sequence[int])
    assert_type(
        connection.execute(c.extend_checkpoint_reservation(1, token, TIMEOUT)).one(),
        Row[int, datetime],
    )
    assert_type(
        connection.scalars(c.recover_expired_checkpoint_reservations("group")).all(), Sequence[int]
    )
    assert_type(
        connection.execute(c.record_expired_checkpoint_reservations("group", max_attempts=3)).one(),
        Row[int, CheckpointStatus, int],
    )


def recorder_rows(session: Session) -> None:
    assert_type(
        session.execute(c.record_checkpoints([CheckpointRecord(1, "stream", 3)])).all(),
        Sequence[Row[int, int, str, int, int]],
    )
    assert_type(session.scalars(c.advance_lagging_subscription_checkpoints(1)).all(), Sequence[int])
    assert_type(session.execute(c.ensure_checkpoint_exists(1, "stream")).one(), Row[int, int, int])
    locked = session.execute(c.lock_checkpoint(1, "stream")).one()
    assert_type(locked, Row[int, int, int, CheckpointStatus, datetime | None])
    _, version, position, status, until = locked
    assert_type(version, int)
    assert_type(position, int)
    assert_type(status, CheckpointStatus)
    assert_type(until, datetime | None)


async def subscription_rows(connection: AsyncConnection) -> None:
    found = (await connection.execute(c.get_subscription("group", "name"))).one_or_none()
    assert_type(found, Row[int, SubscriptionStatus, int, int | None] | None)
    added = (await connection.execute(c.add_or_update_subscription("group", "name"))).one()
    assert_type(added, Row[int, SubscriptionStatus, int, int | None])
    set_ = await connection.execute(c.set_subscription_status(1, SubscriptionStatus.ACTIVE))
    assert_type(set_.one(), Row[int, SubscriptionStatus])
    paused = await connection.execute(c.pause_subscription(1))
    assert_type(paused.one(), Row[int, SubscriptionStatus])
    resumed = await connection.execute(c.resume_subscription(1))
    assert_type(resumed.one(), Row[int, SubscriptionStatus])
    reset = await connection.execute(c.reset_subscription_checkpoints(1))
    assert_type(reset.one(), Row[int, SubscriptionStatus, list[str]])
    replayed = await connection.execute(c.replay_subscription(1, target_position=9))
    assert_type(replayed.one(), Row[int, SubscriptionStatus, int])
    assert_type((await connection.scalars(c.finish_replay(1))).all(), Sequence[int])
    renamed = await connection.execute(c.rename_subscription(1, "name"))
    assert_type(renamed.one(), Row[int, str])
    moved = await connection.execute(c.move_subscription(1, "group"))
    assert_type(moved.one(), Row[int, int])
    deleted = await connection.scalars(c.delete_subscription_checkpoints(1))
    assert_type(deleted.all(), Sequence[int])
    assert_type((await connection.execute(c.delete_subscription(1))).one(), Row[int, bool])


async def operator_rows(session: AsyncSession) -> None:
    reservations = (await session.execute(c.list_reservations())).all()
    assert_type(reservations, Sequence[Row[int, str, str, str, int, datetime, int]])
    for statement in c.list_lagging(), c.list_retries(), c.list_failed():
        row = (await session.execute(statement)).one()
        id, group, name, stream, version, position, status, attempts, retries, *_ = row
        assert_type(id, int)
        assert_type(group, str)
        assert_type(name, str)
        assert_type(stream, str)
        assert_type(version, int)
        assert_type(position, int)
        assert_type(status, CheckpointStatus)
        assert_type(attempts, int)
        assert_type(retries, list[JSONValue] | None)
        assert_type(row[9], datetime | None)
        assert_type(row[10], datetime | None)
        assert_type(row[11], datetime)
        assert_type(row[12], int)
    checkpoint = (await session.execute(c.get_checkpoint(1))).one()
    assert_type(checkpoint[0], int)
    assert_type(checkpoint[4], SubscriptionStatus)
    assert_type(checkpoint[8], CheckpointStatus)
    assert_type(checkpoint[10], list[JSONValue] | None)
    assert_type(checkpoint[11], datetime | None)
    assert_type(checkpoint[14], datetime)
    assert_type(
        (await session.execute(c.get_metrics())).one(),
        Row[int, str, str, SubscriptionStatus, int, int, int, int, int, int, int, datetime | None],
    )
    assert_type((await session.scalars(c.skip_checkpoints([1]))).all(), Sequence[int])
    assert_type((await session.scalars(c.schedule_checkpoints([1], TIMEOUT))).all(), Sequence[int])
    assert_type((await session.execute(c.audit_checkpoints())).one(), Row[int, str])
    assert_type((await session.execute(c.repair_checkpoints())).one(), Row[int, list[str]])


# --- the executing layer


def executed(connection: Connection, session: Session) -> None:
    checkpoints = Checkpoints(connection)
    reservations = checkpoints.reserve_next_available_checkpoint("group", TIMEOUT)
    assert_type(reservations, list[Reservation])
    (reservation,) = reservations
    assert_type(checkpoints.get_next_process_at("group"), timedelta | None)
    assert_type(checkpoints.update_checkpoint_position(reservation, 3), CheckpointPosition)
    assert_type(
        checkpoints.update_checkpoint_positions([PositionUpdate.of(reservation, 3)]),
        list[CheckpointPosition],
    )
    assert_type(
        checkpoints.record_checkpoint_error(
            reservation, 3, status=CheckpointStatus.FAILED, retry_attempts=1, error=None
        ),
        CheckpointStatus,
    )
    assert_type(checkpoints.release_checkpoint_reservation(reservation), bool)
    assert_type(checkpoints.release_checkpoint_reservation(1), bool)
    assert_type(checkpoints.extend_checkpoint_reservation(reservation, TIMEOUT), Reservation)
    assert_type(checkpoints.recover_expired_checkpoint_reservations("group"), list[int])
    assert_type(
        checkpoints.record_expired_checkpoint_reservations("group", max_attempts=3),
        list[ExpiredReservation],
    )
    assert_type(
        checkpoints.record_checkpoints([CheckpointRecord(1, "stream", 3)]),
        list[RecordedCheckpoint],
    )
    assert_type(checkpoints.advance_lagging_subscription_checkpoints(1), int)
    assert_type(checkpoints.list_reservations(search="a"), list[ListedReservation])
    assert_type(checkpoints.list_lagging(), list[ListedCheckpoint])
    assert_type(checkpoints.list_retries(), list[ListedCheckpoint])
    assert_type(checkpoints.list_failed(), list[ListedCheckpoint])
    assert_type(checkpoints.get_checkpoint(1), CheckpointDetail | None)
    assert_type(checkpoints.get_metrics(), list[SubscriptionMetrics])
    assert_type(checkpoints.skip_checkpoints([1]), list[int])
    assert_type(checkpoints.schedule_checkpoints([1], TIMEOUT), list[int])

    checkpoints = Checkpoints(session)
    assert_type(checkpoints.get_subscription("group", "name"), Subscription | None)
    assert_type(checkpoints.add_or_update_subscription("group", "name"), Subscription)
    checkpoints.set_subscription_status(1, SubscriptionStatus.ACTIVE)
    assert_type(checkpoints.lock_checkpoint(1, "stream"), LockedCheckpoint | None)
    assert_type(checkpoints.ensure_checkpoint_exists(1, "stream"), CheckpointPosition)
    assert_type(checkpoints.pause_subscription(1), SubscriptionStatus)
    assert_type(checkpoints.resume_subscription(1), SubscriptionStatus)
    assert_type(checkpoints.reset_subscription_checkpoints(1), list[str])
    checkpoints.replay_subscription(1, target_position=9)
    assert_type(checkpoints.finish_replay(1), bool)
    checkpoints.rename_subscription(1, "name")
    checkpoints.move_subscription(1, "group")
    assert_type(checkpoints.delete_subscription_checkpoints(1), int)
    assert_type(checkpoints.delete_subscription(1), bool)
    assert_type(checkpoints.audit_checkpoints(), list[CheckpointViolation])
    assert_type(checkpoints.repair_checkpoints(), list[CheckpointViolation])


async def executed_async(connection: AsyncConnection, session: AsyncSession) -> None:
    checkpoints = AsyncCheckpoints(connection)
    reservations = await checkpoints.reserve_next_available_checkpoint("group", TIMEOUT)
    assert_type(reservations, list[Reservation])
    updated = await checkpoints.update_checkpoint_position(reservations[0], 3)
    assert_type(updated, CheckpointPosition)
    assert_type(await checkpoints.get_next_process_at("group"), timedelta | None)
    assert_type(await checkpoints.get_checkpoint(1), CheckpointDetail | None)
    assert_type(await AsyncCheckpoints(session).get_metrics(), list[SubscriptionMetrics])


# --- the runtime


def handle(connection: Connection, reservation: Reservation) -> int | None:
    assert_type(reservation.reserved_until, datetime)
    connection.execute(c.audit_checkpoints())
    return reservation.stream_version


def handle_all(_connection: Connection, _reservation: Reservation) -> None:
    """Answers nothing."""


def call(reservation: Reservation) -> int | None:
    return reservation.stream_position + 1


async def handle_async(connection: AsyncConnection, reservation: Reservation) -> int | None:
    await connection.execute(c.audit_checkpoints())
    return reservation.stream_version


async def call_async(reservation: Reservation) -> None:
    assert_type(reservation.replay_target_position, int | None)


def consumers(engine: Engine) -> None:
    assert_type(Consumer(engine, "group", handle).drain(), int)
    consumer = Consumer(
        engine,
        "group",
        {"one": handle, "all": handle_all, "outside": OutsideTransaction(call)},
        concurrency=8,
        handlers_per_transaction=4,
        handler_timeout=None,
        retry=RetryPolicy(max_attempts=3, max_attempts_by_type={KeyError: 1}),
    )
    assert_type(consumer.run_once(), int)
    consumer.run(handle_signals=False)
    consumer.stop()


async def consumers_async(engine: AsyncEngine) -> None:
    consumer = AsyncConsumer(
        engine,
        "group",
        {"one": handle_async, "outside": OutsideTransaction(call_async)},
        handlers_per_transaction=4,
    )
    assert_type(await consumer.drain(), int)
    await consumer.run()


messages = Table(
    "messages",
    MetaData(),
    Column("global_position", BigInteger, primary_key=True),
    Column("transaction_id", XID8),
    Column("stream_name", Text),
    Column("version", BigInteger),
    Column("type", Text),
)
message_table = MessageTable(
    global_position=messages.c.global_position,
    transaction_id=messages.c.transaction_id,
    stream_name=messages.c.stream_name,
    stream_position=messages.c.version,
    type=messages.c.type,
)


def read(connection: Connection, after: Position, limit: int) -> list[Message]:
    return message_table(connection, after, limit)


def recorders(engine: Engine, async_engine: AsyncEngine) -> None:
    interests = [Interest("name", categories=["account"], matches=lambda one: one.type != "x")]
    assert_type(Recorder(engine, "group", read, interests), Recorder)
    assert_type(Recorder(engine, "group", message_table, interests), Recorder)
    assert_type(AsyncRecorder(async_engine, "group", message_table, interests), AsyncRecorder)


# --- the rest


def verified(connection: Connection) -> None:
    migrations.verify(connection, schema="billing", allow_newer=True)
    assert_type(migrations.installed_revision(connection), str | None)
    assert_type(migrations.head(), str)


async def verified_async(connection: AsyncConnection) -> None:
    await connection.run_sync(migrations.verify)


def served() -> None:
    with start_server(18, settings={"work_mem": "8MB"}) as server:
        assert_type(server, EmbeddedServer)
        assert_type(server.url("postgres"), URL)
    assert_type(available_majors(), list[int])


def processed(connection: Connection) -> None:
    assert_type(process(connection, handle, 1, "stream", 3), CheckpointDetail)
    assert_type(process(connection, OutsideTransaction(call), 1, "stream"), CheckpointDetail)


async def processed_async(connection: AsyncConnection) -> None:
    assert_type(await process_async(connection, handle_async, 1, "stream", 3), CheckpointDetail)
    outside: OutsideTransaction[Awaitable[int | None]] = OutsideTransaction(call_async)
    assert_type(await process_async(connection, outside, 1, "stream"), CheckpointDetail)
