"""Since when a consumer looks: not past dead rows each time, and yet nothing is overlooked."""

from __future__ import annotations

from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, event, text

from checkpoints import Reservation, reserve_next_available_checkpoint, schedule_checkpoints
from checkpoints.runtime import Consumer
from checkpoints.runtime import _outcomes as outcomes
from checkpoints.runtime._due_since import DueSince
from checkpoints.runtime._outcomes import Goal
from checkpoints.runtime.settings import ConsumerSettings
from tests.runtime.consumers import Bench, Work, until
from tests.support.databases import disposed
from tests.support.factories import (
    FAR_AHEAD,
    GROUP,
    LONG_AGO,
    MINUTE,
    add_checkpoint,
    add_subscription,
    database_time,
    reserve,
)

HOUR = timedelta(hours=1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    fake = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("checkpoints.runtime._due_since.time", fake)
    return now


class Reserves:
    """Stands for a reserve that takes some seconds, and finds these."""

    def __init__(self, clock: list[float], since: DueSince) -> None:
        self.found = [LONG_AGO]
        self.seconds = 0.001
        self.looked: list[datetime | None] = []
        self._clock = clock
        self._since = since

    def __call__(self, due_since: datetime | None) -> list[datetime]:
        self.looked.append(due_since)
        self._clock[0] += self.seconds
        return [one for one in self.found if due_since is None or one >= due_since]

    def take(self, *, surely: bool = False) -> list[datetime | None]:
        """Where it looked."""
        self.looked.clear()
        self._since.take(self, lambda one: one, surely=surely)
        return list(self.looked)


A_LITTLE_BEFORE = LONG_AGO - timedelta(milliseconds=200)


@pytest.fixture
def reserves(clock: list[float]) -> Reserves:
    made = Reserves(clock, DueSince())
    assert made.take() == [None]
    return made


def test_it_looks_since_the_oldest_that_it_took(reserves: Reserves) -> None:
    assert reserves.take() == [A_LITTLE_BEFORE]
    reserves.found = [LONG_AGO + MINUTE, LONG_AGO + HOUR]
    assert reserves.take() == [LONG_AGO]
    assert reserves.take() == [LONG_AGO + MINUTE]
    older = LONG_AGO - timedelta(milliseconds=1)
    reserves.found = [LONG_AGO + HOUR, older]
    assert reserves.take() == [LONG_AGO + MINUTE]
    assert reserves.take() == [LONG_AGO + HOUR]


def test_it_looks_back_a_little_now_and_then_and_for_all_more_rarely(
    reserves: Reserves, clock: list[float]
) -> None:
    """What committed late lies a little before, what was released anywhere."""
    looked = []
    for _ in range(60):
        looked += reserves.take()
        clock[0] += 0.01
    assert looked.count(None) == 1
    assert 8 <= looked.count(A_LITTLE_BEFORE) <= 12
    assert looked.count(LONG_AGO) == 60 - 1 - looked.count(A_LITTLE_BEFORE)


def test_nothing_is_only_answered_after_a_look_for_all_where_that_must_be_known(
    reserves: Reserves,
) -> None:
    reserves.take()
    reserves.found = []
    assert reserves.take() == [LONG_AGO, A_LITTLE_BEFORE]
    assert reserves.take(surely=True) == [A_LITTLE_BEFORE, None]


def test_with_nothing_to_do_it_looks_for_all_at_once_unless_that_takes_long(
    reserves: Reserves, clock: list[float]
) -> None:
    reserves.found = []
    clock[0] += 0.03
    assert reserves.take() == [A_LITTLE_BEFORE, None]
    assert reserves.take() == [A_LITTLE_BEFORE]
    clock[0] += 0.03
    assert reserves.take() == [None]


@pytest.mark.parametrize(
    ("took", "busy", "idle"),
    [(0.001, 0.5, 0.02), (0.02, 0.5, 0.4), (0.1, 2.0, 2.0), (1.0, 20.0, 20.0), (60.0, 30.0, 30.0)],
)
def test_looking_for_all_takes_no_more_than_a_twentieth_of_the_time(
    clock: list[float], took: float, busy: float, idle: float
) -> None:
    since = DueSince()
    reserves = Reserves(clock, since)
    reserves.seconds = took
    reserves.take()
    reserves.seconds = 0
    begun = clock[0]
    clock[0] = begun + idle - 0.002
    assert since.until_all() == pytest.approx(timedelta(seconds=0.002), abs=timedelta.resolution)
    for found in ([], [LONG_AGO]):
        reserves.found = found
        assert None not in reserves.take()
    clock[0] = begun + busy - 0.001
    assert None not in reserves.take()
    clock[0] = begun + busy + 0.001
    assert reserves.take() == [None]


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


def test_a_consumer_that_runs_finds_what_lies_before_what_it_took(bench: Bench) -> None:
    bench.fill("account-1", "account-2")
    (late,) = bench.fill("account-3", process_at=FAR_AHEAD)

    async def write(work: Work) -> None:
        await work.write()

    with bench.consumer(write).running():
        until(lambda: len(bench.notes()) == 2)
        with bench.engine.begin() as connection:
            connection.execute(schedule_checkpoints([late], LONG_AGO))
        until(lambda: len(bench.notes()) == 3)


def test_a_consumer_that_runs_is_told_when_to_look_for_all_again(
    clock: list[float], connection: Connection
) -> None:
    """Each time that it finds nothing would be too often where that takes long."""
    subscription = add_subscription(connection)
    add_checkpoint(connection, subscription, process_at=LONG_AGO)
    add_checkpoint(connection, subscription, "late", process_at=FAR_AHEAD)
    connection.commit()
    since, settings = DueSince(), ConsumerSettings(group=GROUP)
    looked: list[str] = []

    def executed(_: Any, __: Any, sql: str, parameters: Any, *___: Any) -> None:
        clock[0] += 0.1
        (moment,) = [value for name, value in parameters.items() if name.endswith("due_since")]
        looked.append(f"{'next' if 'due_in' in sql else 'reserve'} since {moment}")

    event.listen(connection, "before_cursor_execute", executed)

    def reserve(goal: Goal) -> tuple[int, timedelta | None]:
        found, due_in = outcomes.reserve(connection, settings, None, since, 1, goal)
        return len(found), due_in

    a_little_before = LONG_AGO - timedelta(milliseconds=200)
    assert reserve(Goal.NEVER) == (1, None)
    assert reserve(Goal.NEVER) == (0, timedelta(seconds=1.8))
    assert looked == [
        "reserve since None",
        f"reserve since {a_little_before}",
        f"next since {a_little_before}",
    ]
    looked.clear()
    found, due_in = reserve(Goal.DRAINED)
    assert (found, looked[-1]) == (0, "next since None")
    assert due_in is not None
    assert due_in > timedelta(days=1)


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
