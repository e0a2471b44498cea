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
BEFORE = LONG_AGO - timedelta(seconds=5)


@pytest.fixture
def since() -> DueSince:
    return DueSince()


@pytest.fixture
def reserves(clock: list[float], since: DueSince) -> Reserves:
    made = Reserves(clock, since)
    assert made.take() == [None]
    return made


def look_for_all(reserves: Reserves, clock: list[float], seconds: float) -> None:
    """Twice, for one that takes long may be chance."""
    reserves.seconds = seconds
    for _ in range(2):
        clock[0] += 60
        assert reserves.take() == [None]
    reserves.seconds = 0


def test_it_looks_since_the_oldest_that_it_took(reserves: Reserves) -> None:
    assert reserves.take() == [A_LITTLE_BEFORE]
    reserves.found = [LONG_AGO + MINUTE, LONG_AGO + HOUR]
    assert reserves.take() == [LONG_AGO]
    assert reserves.take() == [LONG_AGO + MINUTE]


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
    reserves: Reserves, clock: list[float]
) -> None:
    look_for_all(reserves, clock, 0.1)
    reserves.take()
    assert reserves.take() == [LONG_AGO]
    reserves.found = []
    assert reserves.take(surely=True) == [LONG_AGO, None]
    assert reserves.take(surely=True) == [None]


def test_with_nothing_to_do_it_looks_for_all_at_once_unless_that_takes_long(
    reserves: Reserves, clock: list[float]
) -> None:
    reserves.found = []
    assert reserves.take() == [A_LITTLE_BEFORE, None]
    look_for_all(reserves, clock, 0.1)
    for _ in range(3):
        assert reserves.take() == [BEFORE]
        clock[0] += 0.5
    clock[0] += 0.6
    assert reserves.take() == [None]


@pytest.mark.parametrize(
    ("took", "busy", "idle"),
    [(0.001, 0.5, 0.02), (0.02, 0.5, 0.4), (0.1, 2.0, 2.0), (1.0, 10.0, 10.0), (60.0, 10.0, 10.0)],
)
def test_looking_for_all_takes_no_more_than_a_twentieth_of_the_time(
    clock: list[float], since: DueSince, reserves: Reserves, took: float, busy: float, idle: float
) -> None:
    look_for_all(reserves, clock, took)
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


def test_one_look_that_takes_long_does_not_count(
    clock: list[float], since: DueSince, reserves: Reserves
) -> None:
    """As the first, with nothing in the caches."""
    clock[0] += 1
    reserves.seconds = 5
    assert reserves.take() == [None]
    assert since.until_all() < timedelta(seconds=0.1)


def test_what_it_costs_to_take_many_does_not_count(since: DueSince, reserves: Reserves) -> None:
    reserves.seconds = 0.2
    for _ in range(10):
        reserves.take()
    assert since.until_all() < timedelta(seconds=0.1)


def test_a_look_for_all_that_fails_is_not_tried_again_at_once(
    clock: list[float], since: DueSince, reserves: Reserves
) -> None:
    """It may be a timeout of the server's: what is near would never be taken."""
    clock[0] += 1

    def fail(due_since: datetime | None) -> list[datetime]:
        assert due_since is None
        clock[0] += 5
        raise TimeoutError

    with pytest.raises(TimeoutError):
        since.take(fail, lambda one: one, surely=False)
    assert None not in reserves.take()


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


@pytest.mark.parametrize("busy", [True, False])
def test_a_consumer_that_runs_finds_what_lies_before_what_it_took(bench: Bench, busy: bool) -> None:
    bench.fill("account-1", version=1_000_000 if busy else 1)
    (late,) = bench.fill("late", process_at=FAR_AHEAD)

    async def one_message(work: Work) -> int:
        await work.write()
        return work.reservation.stream_position + 1

    with bench.consumer(one_message).running():
        until(lambda: len(bench.notes()) >= (10 if busy else 1))
        with bench.engine.begin() as connection:
            connection.execute(schedule_checkpoints([late], LONG_AGO))
        until(lambda: "late" in bench.notes())


def test_a_consumer_that_runs_is_told_when_to_look_for_all_again(
    clock: list[float], connection: Connection
) -> None:
    """Each time that it finds nothing would be too often where that takes long."""
    subscription = add_subscription(connection)
    for n in range(2):
        add_checkpoint(connection, subscription, f"account-{n}", process_at=LONG_AGO)
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
        looked.clear()
        found, due_in = outcomes.reserve(connection, settings, None, since, 1, goal, by_itself=True)
        return len(found), due_in

    for _ in range(2):
        clock[0] += 60
        assert reserve(Goal.NEVER) == (1, None)
        assert looked == ["reserve since None"]
    assert reserve(Goal.NEVER) == (0, timedelta(seconds=1.7))
    assert looked == [
        f"reserve since {A_LITTLE_BEFORE}",
        f"reserve since {BEFORE}",
        f"next since {BEFORE}",
    ]
    found, due_in = reserve(Goal.DRAINED)
    assert (found, looked) == (0, ["reserve since None", "next since None"])
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
