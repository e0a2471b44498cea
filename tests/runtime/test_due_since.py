"""Since when a consumer looks: not past dead rows each time, and yet nothing is overlooked."""

from __future__ import annotations

from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, event, text

from checkpoints import Reservation, reserve_next_available_checkpoint, schedule_checkpoints
from checkpoints.runtime import Consumer
from checkpoints.runtime._due_since import DueSince
from tests.support.databases import disposed
from tests.support.factories import (
    GROUP,
    LONG_AGO,
    MINUTE,
    add_checkpoint,
    add_subscription,
    database_time,
    reserve,
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    fake = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("checkpoints.runtime._due_since.time", fake)
    return now


class Reserves:
    """Stands for a reserve that takes some seconds, and finds these."""

    def __init__(self, clock: list[float], seconds: float = 0.001) -> None:
        self.found = [LONG_AGO]
        self.looked: list[datetime | None] = []
        self._clock = clock
        self._seconds = seconds

    def __call__(self, due_since: datetime | None) -> list[datetime]:
        self.looked.append(due_since)
        self._clock[0] += self._seconds
        return [one for one in self.found if due_since is None or one >= due_since]

    def take(self, since: DueSince) -> list[datetime]:
        return since.take(self, lambda one: one)


A_LITTLE = timedelta(milliseconds=200)


def test_it_looks_since_a_little_before_the_oldest_it_took(clock: list[float]) -> None:
    since, reserves = DueSince(), Reserves(clock)
    reserves.found = [LONG_AGO, LONG_AGO + MINUTE]
    for _ in range(2):
        assert reserves.take(since) == reserves.found
    assert reserves.looked == [None, LONG_AGO - A_LITTLE]


def test_all_is_looked_for_when_nothing_is_due_since_then(clock: list[float]) -> None:
    since, reserves = DueSince(), Reserves(clock)
    reserves.take(since)
    reserves.found = [LONG_AGO - MINUTE]
    assert reserves.take(since) == reserves.found
    assert reserves.looked == [None, LONG_AGO - A_LITTLE, None]
    assert reserves.take(since) == reserves.found
    assert reserves.looked[-1] == LONG_AGO - MINUTE - A_LITTLE
    reserves.found = []
    assert reserves.take(since) == []
    assert reserves.looked[-1] is None


@pytest.mark.parametrize(
    ("took", "pause"), [(0.001, 0.5), (0.025, 0.5), (0.1, 2.0), (1.0, 20.0), (60.0, 30.0)]
)
def test_looking_for_all_takes_no_more_than_a_twentieth_of_the_time(
    clock: list[float], took: float, pause: float
) -> None:
    since, reserves = DueSince(), Reserves(clock, took)
    reserves.take(since)
    quick = Reserves(clock, 0)
    clock[0] += pause - 0.01
    quick.take(since)
    clock[0] += 0.02
    quick.take(since)
    assert quick.looked == [LONG_AGO - A_LITTLE, None]


def test_when_nothing_is_due_since_then_all_is_looked_for(connection: Connection) -> None:
    """What an operator schedules for a time that is past is taken by the same drain."""
    subscription = add_subscription(connection)
    for n in range(3):
        add_checkpoint(connection, subscription, f"account-{n}")
    late = add_checkpoint(
        connection, subscription, "late", process_at=database_time(connection) + MINUTE
    )
    connection.execute(text("CREATE TABLE seen (stream_name text)"))
    connection.commit()

    def handler(own: Connection, reservation: Reservation) -> None:
        own.execute(text("INSERT INTO seen VALUES (:name)"), {"name": reservation.stream_name})
        if reservation.stream_name == "account-0":
            connection.execute(schedule_checkpoints([late], LONG_AGO))
            connection.commit()

    with disposed(create_engine(connection.engine.url)) as engine:
        assert Consumer(engine, GROUP, handler, concurrency=1, listen=False).drain() == 4
    assert connection.scalars(text("SELECT stream_name FROM seen")).all()[-1] in (
        "late",
        "account-1",
        "account-2",
    )


def blocks_read(connection: Connection, due_since: datetime | None) -> int:
    """How many blocks a reserve touches."""

    def explain(_: Any, __: Any, sql: str, parameters: Any, *___: Any) -> tuple[str, Any]:
        return f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) {sql}", parameters

    statement = reserve_next_available_checkpoint(GROUP, MINUTE, due_since=due_since)
    event.listen(connection, "before_cursor_execute", explain, retval=True)
    try:
        plan = connection.execution_options(compiled_cache=None).execute(statement).cursor
        row = None if plan is None else plan.fetchone()
        assert row is not None
        top = row[0][0]["Plan"]
    finally:
        event.remove(connection, "before_cursor_execute", explain)
    connection.rollback()
    return int(top["Shared Hit Blocks"] + top["Shared Read Blocks"])


def test_dead_rows_are_not_walked_past(connection: Connection) -> None:
    """The index reads what is due since then, whatever a transaction elsewhere keeps."""
    subscription = add_subscription(connection)
    connection.exec_driver_sql(
        "INSERT INTO checkpoints.checkpoints (subscription_id, stream_name, stream_version,"
        f" process_at) SELECT {subscription}, 'account-' || n, 1,"
        " statement_timestamp() - interval '1 hour' + n * interval '1 ms'"
        " FROM generate_series(1, 3000) AS n"
    )
    connection.commit()
    with disposed(create_engine(connection.engine.url)) as engine, engine.connect() as holder:
        holder.execution_options(isolation_level="REPEATABLE READ")
        holder.execute(text("SELECT 1")).all()
        connection.exec_driver_sql("UPDATE checkpoints.checkpoints SET stream_position = 1")
        last = add_checkpoint(connection, subscription, "last")
        connection.commit()
        read = {
            since: blocks_read(connection, since)
            for since in (None, database_time(connection) - MINUTE)
        }
        everything, since = read.values()
        assert reserve(connection).id == last
        assert since * 3 < everything, read
