"""Handlers that share a transaction: one commit, or each by itself."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import URL, Connection, Engine, create_engine, event, text
from sqlalchemy.ext.asyncio import create_async_engine

from checkpoints import CheckpointStatus, Reservation, release_checkpoint_reservation
from checkpoints.runtime import AsyncConsumer, Consumer, OutsideTransaction, RetryPolicy
from checkpoints.runtime._held import Held
from tests.runtime.consumers import until
from tests.support.databases import disposed
from tests.support.factories import (
    GROUP,
    MINUTE,
    add_checkpoint,
    add_subscription,
    state,
    violations,
)

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


class SlowLog(logging.Handler):
    """Of the application's: it takes its time, such as one that writes over a network."""

    def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002
        time.sleep(0.2)


@pytest.fixture
def slow_log() -> Iterator[None]:
    slow = SlowLog()
    logging.getLogger("checkpoints").addHandler(slow)
    yield
    logging.getLogger("checkpoints").removeHandler(slow)


@contextmanager
def running(made: Consumer) -> Iterator[None]:
    thread = threading.Thread(target=made.run)
    thread.start()
    try:
        yield
    finally:
        made.stop()
        made.stop()
        thread.join(20)
    assert not thread.is_alive()


@pytest.mark.usefixtures("slow_log")
def test_a_handler_that_wakes_when_it_is_given_up_keeps_no_slot(
    engine: Engine, connection: Connection, ids: list[int]
) -> None:
    """It goes on after each error of the database, and ends when its connection is broken."""

    def handler(connection: Connection, reservation: Reservation) -> None:
        if reservation.stream_name == "account-2":
            while True:
                with connection.begin_nested():
                    try:
                        with connection.begin_nested():
                            connection.execute(text("SELECT pg_sleep(60)"))
                    except Exception as error:
                        if "cancel" not in str(error):
                            time.sleep(0.05)
                            raise
        write(connection, reservation)

    made = consumer(
        engine, handler, handler_timeout=timedelta(milliseconds=300), retry=ONCE, grace=MINUTE
    )
    with running(made):
        until(lambda: len(notes(connection)) == 8)
        failed = lambda: state(connection, ids[2]).status is CheckpointStatus.FAILED  # noqa: E731
        until(failed)
        connection.rollback()


@pytest.mark.parametrize("seconds", [3.3, 3.6, 3.9])
def test_what_shares_with_one_that_hangs_is_not_lost_when_it_is_extended_just_then(
    *,
    engine: Engine,
    connection: Connection,
    ids: list[int],
    seconds: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ends = threading.Event()

    def handler(connection: Connection, reservation: Reservation) -> None:
        if reservation.stream_name == "account-2":
            ends.wait(30)
        write(connection, reservation)

    made = consumer(
        engine,
        handler,
        handler_timeout=timedelta(seconds=1),
        reservation_timeout=timedelta(seconds=seconds),
        recover_interval=MINUTE,
        retry=ONCE,
    )
    try:
        with running(made):
            until(lambda: len(notes(connection)) == 8)
    finally:
        ends.set()
    assert [record for record in caplog.records if "lost" in record.getMessage()] == []
    assert len(ids) == 9


def test_a_retry_policy_that_raises_keeps_no_slot(
    engine: Engine, connection: Connection, ids: list[int]
) -> None:
    class Strict(RetryPolicy):
        def attempts_for(self, error: BaseException) -> int:
            raise LookupError(f"no rule for {error!r}")

    def handler(connection: Connection, reservation: Reservation) -> None:
        if reservation.stream_name == "account-2":
            connection.execute(text("SELECT pg_sleep(60)"))
        write(connection, reservation)

    made = consumer(engine, handler, handler_timeout=timedelta(seconds=0.5), retry=Strict())
    with running(made):
        until(lambda: len(notes(connection)) == 8)
    assert len(ids) == 9


def test_what_took_too_long_with_others_fails_by_its_own_error_alone(
    engine: Engine, connection: Connection, ids: list[int]
) -> None:
    """It is told to end, does not, and is rolled back for the error of another."""
    runs: list[str] = []

    def handler(connection: Connection, reservation: Reservation) -> None:
        name = reservation.stream_name
        runs.append(name)
        if name == "account-0" and runs.count(name) == 1:
            # Without a statement, which would be cancelled.
            until(lambda: made_held(made, ids[0]).timed_out)
            return
        if name in {"account-0", "account-1"}:
            raise ValueError("its own")
        write(connection, reservation)

    made = consumer(engine, handler, handler_timeout=timedelta(seconds=2), retry=ONCE)
    assert made.run_once() == 7
    errors = state(connection, ids[0]).retries
    assert errors is not None
    assert errors[0]["error"]["type"] == "builtins.ValueError"


def made_held(made: Consumer, id: int) -> Held:
    return next(held for held in list(made._running) if held.reservation.id == id)


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
