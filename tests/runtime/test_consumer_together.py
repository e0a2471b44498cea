"""Handlers that share a transaction: one commit, or each by itself."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import URL, Connection, Engine, create_engine, event, text
from sqlalchemy.ext.asyncio import create_async_engine

from checkpoints import CheckpointStatus, Reservation, release_checkpoint_reservation
from checkpoints.runtime import AsyncConsumer, Consumer, OutsideTransaction, RetryPolicy
from tests.runtime.consumers import until
from tests.support.databases import disposed
from tests.support.factories import GROUP, add_checkpoint, add_subscription, state, violations

SOON = timedelta(milliseconds=20)
ONCE = RetryPolicy(max_attempts=1)


@pytest.fixture
def engine(migrated_url: URL) -> Iterator[Engine]:
    with disposed(create_engine(migrated_url, pool_size=10)) as made:
        yield made


@pytest.fixture
def ids(connection: Connection) -> list[int]:
    """Nine streams of a subscription, the first due first."""
    connection.execute(text("CREATE TABLE notes (stream_name text, xid xid8)"))
    subscription = add_subscription(connection)
    made = [add_checkpoint(connection, subscription, f"account-{n}") for n in range(9)]
    connection.commit()
    return made


def write(connection: Connection, reservation: Reservation) -> None:
    connection.execute(
        text("INSERT INTO notes VALUES (:name, pg_current_xact_id())"),
        {"name": reservation.stream_name},
    )


def notes(connection: Connection) -> dict[str, str]:
    """The transaction that wrote each stream's note; every stream has one."""
    rows = connection.execute(text("SELECT stream_name, CAST(xid AS text) FROM notes")).all()
    connection.rollback()
    assert len({row[0] for row in rows}) == len(rows)
    return {row[0]: row[1] for row in rows}


def consumer(engine: Engine, handler: Any, **settings: Any) -> Consumer:
    settings = {"concurrency": 1, "handlers_per_transaction": 9, "listen": False} | settings
    return Consumer(engine, GROUP, handler, **settings)


def test_their_positions_and_writes_are_one_transaction(
    engine: Engine, connection: Connection, ids: list[int]
) -> None:
    updates: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        if "SET stream_position" in statement:
            updates.append(statement)

    assert consumer(engine, write).drain() == 9
    assert len(set(notes(connection).values())) == 1
    assert [state(connection, id).position for id in ids] == [3] * 9
    assert len(updates) == 1
    assert violations(connection) == []


@pytest.mark.parametrize(
    ("concurrency", "together", "most"), [(1, 4, 4), (2, 9, 5), (3, 9, 3), (4, 1, 1)]
)
def test_those_that_wait_are_shared_out(
    *,
    engine: Engine,
    connection: Connection,
    ids: list[int],
    concurrency: int,
    together: int,
    most: int,
) -> None:
    made = consumer(
        engine, write, concurrency=concurrency, handlers_per_transaction=together, batch=9
    )
    assert made.drain() == len(ids)
    assert max(Counter(notes(connection).values()).values()) <= most
    assert len(notes(connection)) == len(ids)


def test_when_one_raises_the_others_are_processed_alone(
    engine: Engine, connection: Connection, ids: list[int]
) -> None:
    runs: Counter[str] = Counter()

    def handler(connection: Connection, reservation: Reservation) -> None:
        runs[reservation.stream_name] += 1
        write(connection, reservation)
        if reservation.stream_name == "account-4":
            raise ValueError("refused")

    assert consumer(engine, handler, retry=ONCE).run_once() == 8
    written = notes(connection)
    assert set(written) == {f"account-{n}" for n in range(9) if n != 4}
    assert len(set(written.values())) == 8
    assert runs["account-4"] == 2
    assert runs["account-8"] == 1
    failed = state(connection, ids[4])
    assert (failed.status, failed.retry_attempts) == (CheckpointStatus.FAILED, 1)
    assert violations(connection) == []


def test_when_one_is_lost_the_others_are_processed_alone(
    engine: Engine, connection: Connection, ids: list[int]
) -> None:
    def handler(own: Connection, reservation: Reservation) -> None:
        write(own, reservation)
        if reservation.stream_name == "account-0":
            connection.execute(release_checkpoint_reservation(ids[5]))
            connection.commit()

    made = consumer(engine, handler)
    assert made.run_once() == 8
    assert set(notes(connection)) == {f"account-{n}" for n in range(9) if n != 5}
    assert state(connection, ids[5]).ready is not None
    assert made.drain() == 1
    assert len(notes(connection)) == 9


def test_a_retry_and_a_handler_outside_a_transaction_share_none(
    engine: Engine, connection: Connection, ids: list[int]
) -> None:
    connection.execute(
        text(
            "UPDATE checkpoints.checkpoints SET status = 'retry', retry_attempts = 1 WHERE id = :id"
        ),
        {"id": ids[4]},
    )
    outside = add_subscription(connection, "mails")
    add_checkpoint(connection, outside, "mail")
    connection.commit()
    mailed: list[str] = []
    handlers = {
        "balances": write,
        "mails": OutsideTransaction(lambda reservation: mailed.append(reservation.stream_name)),
    }
    assert consumer(engine, handlers).drain() == 10
    assert mailed == ["mail"]
    written = notes(connection)
    own = written.pop("account-4")
    assert own not in written.values()


def test_one_that_takes_too_long_is_not_run_again_with_its_attempt(
    engine: Engine, connection: Connection, ids: list[int]
) -> None:
    runs: Counter[str] = Counter()

    def handler(connection: Connection, reservation: Reservation) -> None:
        runs[reservation.stream_name] += 1
        write(connection, reservation)
        if reservation.stream_name == "account-4":
            connection.execute(text("SELECT pg_sleep(60)"))

    made = consumer(engine, handler, retry=ONCE, handler_timeout=timedelta(seconds=1), batch=9)
    assert made.run_once() == 8
    assert runs["account-4"] == 1
    failed = state(connection, ids[4])
    assert failed.status is CheckpointStatus.FAILED
    assert failed.retries is not None
    assert failed.retries[0]["error"]["type"] == "builtins.TimeoutError"
    assert len(notes(connection)) == 8


def test_what_shares_with_a_handler_that_hangs_is_given_to_another_worker(
    engine: Engine, connection: Connection, ids: list[int]
) -> None:
    hangs, ends = threading.Event(), threading.Event()

    def handler(connection: Connection, reservation: Reservation) -> None:
        write(connection, reservation)
        if reservation.stream_name == "account-4":
            hangs.set()
            ends.wait(30)

    made = consumer(engine, handler, retry=ONCE, handler_timeout=timedelta(seconds=0.5))
    thread = threading.Thread(target=made.run, daemon=True)
    thread.start()
    try:
        assert hangs.wait(15)
        until(lambda: len(notes(connection)) == 8)
        assert state(connection, ids[4]).status is CheckpointStatus.FAILED
        connection.rollback()
    finally:
        ends.set()
        made.stop()
        thread.join(15)
    assert not thread.is_alive()
    assert len(notes(connection)) == 8
    assert violations(connection) == []


def test_a_reservation_that_is_extended_meanwhile_is_updated_by_its_new_token(
    engine: Engine, connection: Connection, ids: list[int]
) -> None:
    tokens = []

    def handler(own: Connection, reservation: Reservation) -> None:
        write(own, reservation)
        if reservation.stream_name == "account-8":
            first = reservation.reserved_until
            until(lambda: state(connection, ids[0]).reserved_until != first)
            connection.rollback()
            tokens.append(first)

    made = consumer(engine, handler, reservation_timeout=timedelta(seconds=3))
    assert made.drain() == 9
    assert len(set(notes(connection).values())) == 1
    assert tokens


def test_an_asyncio_consumer_has_no_such_transaction() -> None:
    engine = create_async_engine("postgresql+psycopg://")

    async def handler(*_: Any) -> None:
        raise NotImplementedError

    with pytest.raises(ValueError, match="handlers_per_transaction must be 1"):
        AsyncConsumer(engine, GROUP, handler, handlers_per_transaction=2)


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_a_bad_number_is_refused(engine: Engine, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="handlers_per_transaction must be"):
        consumer(engine, write, handlers_per_transaction=value)
