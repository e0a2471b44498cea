"""What both consumers do when a handler fails, hangs or loses the database."""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text

from checkpoints import CheckpointStatus, ReservationLost
from checkpoints.runtime import RetryPolicy
from tests.runtime.consumers import Bench, Outside, Work, until
from tests.support.factories import FAR_AHEAD, LONG_AGO, State, state, violations

HOUR = timedelta(hours=1)
SOON = timedelta(milliseconds=20)


async def write(work: Work) -> None:
    await work.write()


def after(bench: Bench, id: int) -> State:
    with bench.engine.connect() as connection:
        return state(connection, id)


def errors(bench: Bench, id: int) -> list[Any]:
    return after(bench, id).retries or []


# --- errors of a handler


def test_a_handler_that_raises_is_rolled_back_and_the_error_is_kept(bench: Bench) -> None:
    ids = bench.fill("account-1")

    async def failing(work: Work) -> None:
        await work.write()
        raise KeyError("no such account")

    assert bench.consumer(failing).drain() == 0

    assert bench.notes() == []
    (entry,) = errors(bench, ids[0])
    assert entry["attempt"] == 1
    assert entry["recorded_at"]
    assert entry["error"]["type"] == "builtins.KeyError"
    assert entry["error"]["message"] == "'no such account'"
    assert "raise KeyError" in entry["error"]["traceback"]
    assert after(bench, ids[0]).status is CheckpointStatus.RETRY


def test_a_stream_that_fails_holds_up_no_other(bench: Bench) -> None:
    ids = bench.fill("broken", "account-1", "account-2")

    async def failing(work: Work) -> None:
        await work.write()
        if work.reservation.stream_name == "broken":
            raise ValueError("broken")

    runner = bench.consumer(failing, concurrency=1)
    assert runner.drain() == 2

    assert sorted(bench.notes()) == ["account-1", "account-2"]
    assert after(bench, ids[0]).status is CheckpointStatus.RETRY


def test_after_the_last_attempt_it_has_failed_with_all_its_errors(bench: Bench) -> None:
    ids = bench.fill("account-1")

    async def failing(work: Work) -> None:
        raise ValueError(f"attempt {work.reservation.retry_attempts + 1}")

    retry = RetryPolicy(max_attempts=3, first_delay=SOON)
    with bench.consumer(failing, retry=retry).running():
        until(lambda: after(bench, ids[0]).status is CheckpointStatus.FAILED)

    kept = errors(bench, ids[0])
    assert [entry["error"]["message"] for entry in kept] == [f"attempt {n}" for n in (1, 2, 3)]
    assert [entry["attempt"] for entry in kept] == [1, 2, 3]
    assert after(bench, ids[0]).process_at is None


def test_the_type_of_an_error_says_how_many_attempts_there_are(bench: Bench) -> None:
    ids = bench.fill("permanent", "passing")

    async def failing(work: Work) -> None:
        raise (UnicodeError if work.reservation.stream_name == "permanent" else OSError)("no")

    # UnicodeError is a ValueError.
    bench.consumer(failing, retry=RetryPolicy(max_attempts_by_type={ValueError: 1})).drain()

    assert after(bench, ids[0]).status is CheckpointStatus.FAILED
    assert after(bench, ids[1]).status is CheckpointStatus.RETRY


def test_an_attempt_that_succeeds_clears_the_errors(bench: Bench) -> None:
    ids = bench.fill("account-1")
    runs: list[int] = []

    async def failing_once(_work: Work) -> None:
        runs.append(1)
        if len(runs) == 1:
            raise ValueError("once")

    with bench.consumer(failing_once, retry=RetryPolicy(first_delay=SOON)).running():
        until(lambda: after(bench, ids[0]).position == 3)

    assert errors(bench, ids[0]) == []


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("error", "kept_message"),
    [
        (
            ValueError("a NUL \x00 and half of a pair \ud800"),
            r"a NUL \x00 and half of a pair \ud800",
        ),
        (Unspeakable(), "<no message: RuntimeError>"),
        (ExceptionGroup("several", [ValueError("one"), KeyError("two")]), "several (2 sub"),
        (ValueError("long " * 100_000), "long long"),
        (ReservationLost(1, LONG_AGO), "the reservation of checkpoint 1"),
        (SystemExit(3), "3"),
        (asyncio.CancelledError("by itself"), "by itself"),
        (GeneratorExit("odd"), "odd"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_whatever_a_handler_raises_is_kept(
    bench: Bench, caplog: pytest.LogCaptureFixture, error: BaseException, kept_message: str
) -> None:
    # The traceback of the log record holds what the error says as it is: xdist cannot send it.
    caplog.set_level("CRITICAL", logger="checkpoints")
    ids = bench.fill("account-1", "account-2")

    async def failing(work: Work) -> None:
        await work.write()
        if work.reservation.stream_name == "account-1":
            raise error

    assert bench.consumer(failing, concurrency=1).drain() == 1

    assert bench.notes() == ["account-2"]
    (entry,) = errors(bench, ids[0])
    assert entry["error"]["message"].startswith(kept_message)
    assert len(str(entry)) < 20_000


def test_an_error_outside_a_transaction_is_kept_too(bench: Bench) -> None:
    ids = bench.fill("account-1")

    async def failing(_work: Work) -> None:
        raise OSError("the other system is away")

    bench.consumer(Outside(failing)).drain()

    assert "the other system" in errors(bench, ids[0])[0]["error"]["message"]


def test_an_error_that_cannot_be_recorded_lets_the_reservation_expire(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    ids = bench.fill("account-1")
    bench.execute("ALTER TABLE checkpoints.checkpoints ADD CHECK (retries IS NULL)")

    async def failing(_work: Work) -> None:
        raise ValueError("no")

    runner = bench.consumer(
        failing, reservation_timeout=timedelta(seconds=0.6), recover_interval=HOUR
    )
    with runner.running():
        until(lambda: "could not be recorded" in caplog.text)
        until(
            lambda: bench.ask(
                "SELECT reserved_until < clock_timestamp() FROM checkpoints.checkpoints"
                " WHERE id = :id",
                id=ids[0],
            ),
            "the reservation expires",
            deadline=3,
        )


def test_logging_that_raises_stops_no_work(bench: Bench) -> None:
    bench.fill("account-1", "account-2", "account-3")

    def refuse(_record: logging.LogRecord) -> bool:
        raise RuntimeError("logging is broken")

    async def failing(work: Work) -> None:
        await work.write()
        if work.reservation.stream_name == "account-1":
            raise ValueError("no")

    logger = logging.getLogger("checkpoints")
    before = logger.level
    logger.setLevel("DEBUG")
    logger.addFilter(refuse)
    try:
        bench.consumer(failing, concurrency=1).drain()
    finally:
        logger.removeFilter(refuse)
        logger.setLevel(before)

    assert sorted(bench.notes()) == ["account-2", "account-3"]


# --- handlers that take too long

SHORT: dict[str, Any] = {"handler_timeout": timedelta(seconds=0.3), "concurrency": 1}


def test_a_handler_that_waits_for_the_database_too_long_is_ended(bench: Bench) -> None:
    ids = bench.fill("slow", "account-1")

    async def hanging(work: Work) -> None:
        await work.write()
        if work.reservation.stream_name == "slow":
            await work.execute(text("SELECT pg_sleep(60)"))

    assert bench.consumer(hanging, **SHORT).drain() == 1

    assert bench.notes() == ["account-1"]
    (entry,) = errors(bench, ids[0])
    assert entry["error"]["type"] == "builtins.TimeoutError"
    assert "took longer than 0.3 s" in entry["error"]["message"]
    # Where it hung.
    assert "pg_sleep" in entry["error"]["traceback"]


def test_a_handler_that_nobody_can_stop_frees_its_slot_and_writes_nothing(bench: Bench) -> None:
    ids = bench.fill("stubborn", "account-1")
    go_on, ended = threading.Event(), threading.Event()

    async def stubborn(work: Work) -> None:
        await work.write()
        if work.reservation.stream_name == "stubborn":
            while not go_on.is_set():
                with suppress(asyncio.CancelledError):
                    await work.wait(go_on)
            ended.set()

    runner = bench.consumer(stubborn, **SHORT)
    with runner.running():
        until(lambda: bench.notes() == ["account-1"])
        until(lambda: errors(bench, ids[0]))
        assert not ended.is_set()
        go_on.set()
        assert ended.wait(10)

    assert bench.notes() == ["account-1"]
    (entry,) = errors(bench, ids[0])
    assert entry["error"]["type"] == "builtins.TimeoutError"


class Broken(RetryPolicy):
    """A policy of the application's that raises."""

    def delay_after(self, attempt: int) -> timedelta:
        raise ZeroDivisionError(attempt)


def test_a_policy_that_raises_keeps_the_keeper_from_nothing(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    ids = bench.fill("stubborn", "account-1")
    go_on = threading.Event()

    async def stubborn(work: Work) -> None:
        await work.write()
        while work.reservation.id == ids[0] and not go_on.is_set():
            with suppress(asyncio.CancelledError):
                await work.wait(go_on)

    with bench.consumer(stubborn, retry=Broken(), **SHORT).running():
        until(lambda: bench.notes() == ["account-1"])
        go_on.set()

    assert bench.notes() == ["account-1"]
    assert errors(bench, ids[0]) == []
    assert [one.message for one in caplog.records if one.exc_info] == ["giving up failed"]


def test_a_handler_whose_reservation_is_lost_and_that_hangs_frees_its_slot(bench: Bench) -> None:
    ids = bench.fill("stubborn", "account-1")
    started, go_on = threading.Event(), threading.Event()

    async def stubborn(work: Work) -> None:
        await work.write()
        if work.reservation.stream_name == "stubborn":
            started.set()
            while not go_on.is_set():
                with suppress(asyncio.CancelledError):
                    await work.wait(go_on)

    runner = bench.consumer(
        stubborn,
        concurrency=1,
        handler_timeout=timedelta(seconds=1),
        reservation_timeout=timedelta(seconds=0.6),
    )
    with runner.running():
        assert started.wait(10)
        bench.execute(
            "UPDATE checkpoints.checkpoints SET reserved_until = NULL, process_at = :at"
            " WHERE id = :id",
            id=ids[0],
            at=FAR_AHEAD,
        )
        until(lambda: bench.notes() == ["account-1"], deadline=8)
        go_on.set()
    assert bench.notes() == ["account-1"]


def test_a_checkpoint_that_is_locked_holds_up_no_other(bench: Bench) -> None:
    ids = bench.fill("locked", "account-1", "account-2")
    locked = threading.Event()

    async def write_late(work: Work) -> None:
        await work.write()
        if work.reservation.stream_name == "locked":
            await work.wait(locked)

    runner = bench.consumer(
        write_late, concurrency=2, handler_timeout=timedelta(seconds=0.3), listen=False
    )
    with bench.engine.connect() as other:
        drained = runner.start_drain()
        until(
            lambda: bench.ask(
                "SELECT reserved_until FROM checkpoints.checkpoints WHERE id = :id", id=ids[0]
            )
        )
        other.execute(
            text("SELECT 1 FROM checkpoints.checkpoints WHERE id = :id FOR UPDATE"),
            {"id": ids[0]},
        )
        # The update of the position waits for the lock, and so would the record of the error.
        locked.set()
        until(lambda: sorted(bench.notes()) == ["account-1", "account-2"])
        with bench.engine.begin() as connection:
            connection.execute(text("SELECT pg_sleep(0.5)"))
        other.rollback()
    drained.result(20)
    assert after(bench, ids[0]).reserved_until is None


# --- the database


def test_a_connection_that_breaks_under_a_handler_costs_no_attempt(bench: Bench) -> None:
    ids = bench.fill("account-1")
    runs: list[int] = []

    async def broken_once(work: Work) -> None:
        await work.write()
        runs.append(1)
        if len(runs) == 1:
            await work.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    assert bench.consumer(broken_once).drain() == 1

    assert bench.notes() == ["account-1"]
    assert len(runs) == 2
    assert after(bench, ids[0]).position == 3


def test_a_handler_that_breaks_every_connection_has_failed_in_the_end(bench: Bench) -> None:
    ids = bench.fill("poison")
    runs: list[int] = []

    async def breaking(work: Work) -> None:
        runs.append(1)
        await work.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    bench.consumer(breaking, handler_timeout=None, retry=RetryPolicy(max_attempts=1)).drain()

    assert after(bench, ids[0]).status is CheckpointStatus.FAILED
    assert 2 <= len(runs) <= 10


def test_connections_of_the_pool_that_broke_while_idle_are_replaced(bench: Bench) -> None:
    bench.fill("account-1")
    runner = bench.consumer(write)
    assert runner.drain() == 1
    bench.terminate()
    bench.fill("account-2")

    assert runner.drain() == 1


def test_it_waits_while_the_database_is_away_and_says_so_once(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.fill("account-1")
    started, go_on = threading.Event(), threading.Event()
    runs: list[int] = []

    async def interrupted(work: Work) -> None:
        runs.append(1)
        started.set()
        await work.wait(go_on)
        await work.write()

    def said(what: str) -> int:
        return sum(what in record.getMessage() for record in caplog.records)

    with caplog.at_level("INFO", logger="checkpoints"):
        runner = bench.consumer(
            interrupted,
            poll_interval=timedelta(seconds=0.05),
            reservation_timeout=timedelta(seconds=60),
        )
        with runner.running():
            assert started.wait(10)
            with bench.away():
                go_on.set()
                until(lambda: said("is away"))
                until(lambda: len(runs) >= 1)
            until(lambda: bench.notes() == ["account-1"])
            until(lambda: said("is back"))

    assert bench.notes() == ["account-1"]
    assert (said("is away"), said("is back")) == (1, 1)


def test_an_error_raised_while_the_database_is_away_is_recorded_when_it_is_back(
    bench: Bench,
) -> None:
    ids = bench.fill("account-1")
    started, go_on = threading.Event(), threading.Event()

    async def failing(work: Work) -> None:
        started.set()
        await work.wait(go_on)
        raise ValueError("meanwhile")

    retry = RetryPolicy(first_delay=HOUR)
    with bench.consumer(Outside(failing), retry=retry).running():
        assert started.wait(10)
        with bench.away():
            go_on.set()
        until(lambda: errors(bench, ids[0]), deadline=20)

    assert errors(bench, ids[0])[0]["error"]["message"] == "meanwhile"


def test_what_was_done_outside_a_transaction_is_not_repeated_when_the_database_was_away(
    bench: Bench,
) -> None:
    ids = bench.fill("account-1")
    started, go_on = threading.Event(), threading.Event()
    runs: list[int] = []

    async def outside(work: Work) -> None:
        runs.append(1)
        started.set()
        await work.wait(go_on)

    with bench.consumer(Outside(outside)).running():
        assert started.wait(10)
        with bench.away():
            go_on.set()
        until(lambda: after(bench, ids[0]).position == 3)

    assert runs == [1]


@pytest.mark.parametrize("outside", [False, True])
def test_a_pool_of_one_connection_is_enough(bench: Bench, outside: bool) -> None:
    bench.fill(*(f"account-{number}" for number in range(12)))
    runs: list[str] = []

    async def noted(work: Work) -> None:
        runs.append(work.reservation.stream_name)

    runner = bench.consumer(
        Outside(noted) if outside else noted,
        engine={"pool_size": 1, "max_overflow": 0},
        reservation_timeout=timedelta(seconds=1),
    )
    assert runner.drain() == 12
    assert len(runs) == 12


def test_with_a_pool_of_one_connection_a_timed_out_handler_is_recorded(bench: Bench) -> None:
    ids = bench.fill("slow", "account-1")

    async def hanging(work: Work) -> None:
        await work.write()
        if work.reservation.stream_name == "slow":
            await work.execute(text("SELECT pg_sleep(60)"))

    runner = bench.consumer(
        hanging, engine={"pool_size": 1, "max_overflow": 0, "pool_timeout": 10}, **SHORT
    )
    assert runner.drain() == 1
    assert errors(bench, ids[0])[0]["error"]["type"] == "builtins.TimeoutError"


def test_a_pool_that_is_exhausted_is_waited_for(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.fill("account-1")
    runner = bench.consumer(
        write, engine={"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.1}, listen=False
    )
    if bench.is_async:
        held = runner.loop.create_task  # type: ignore[attr-defined]
        taken = asyncio.run_coroutine_threadsafe(
            runner.async_engine.connect().start(),  # type: ignore[attr-defined]
            runner.loop,  # type: ignore[attr-defined]
        ).result(10)
        assert held
    else:
        taken = runner.sync_engine.connect()
    drained = runner.start_drain()
    until(lambda: "is away" in caplog.text)
    if bench.is_async:
        asyncio.run_coroutine_threadsafe(
            taken.close(),
            runner.loop,  # type: ignore[attr-defined]
        ).result(10)
    else:
        taken.close()

    assert drained.result(20) == 1
    assert caplog.text.count("is away") == 1


def test_a_statement_timeout_of_its_own_statements_ends_no_consumer(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.fill("account-1")
    runner = bench.consumer(
        write,
        engine={"connect_args": {"options": "-c statement_timeout=200"}},
        poll_interval=timedelta(seconds=0.05),
        recover_interval=HOUR,
    )
    with bench.engine.connect() as other:
        other.execute(text("LOCK TABLE checkpoints.checkpoints"))
        future = runner.start()
        until(lambda: "is away or too busy" in caplog.text)
        assert not future.done()
        other.rollback()
    until(lambda: bench.notes() == ["account-1"])
    runner.stop()
    future.result(20)


def test_nothing_is_lost_or_done_twice_while_connections_are_ended_again_and_again(
    bench: Bench,
) -> None:
    bench.fill(*(f"account-{number}" for number in range(60)))
    runner = bench.consumer(write, batch=10, retry=RetryPolicy(first_delay=SOON))

    with runner.running():
        for _ in range(12):
            bench.terminate()
            done = len(bench.notes())
            until(lambda: len(bench.notes()) > done or done >= 60)  # noqa: B023  # called at once
        until(lambda: len(bench.notes()) >= 60)

    assert len(set(bench.notes())) == len(bench.notes()) == 60
    with bench.engine.connect() as connection:
        assert violations(connection) == []
